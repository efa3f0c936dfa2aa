"""Training checkpoints: what a run needs to go on exactly where it stopped, in the same layout.

RUN/checkpoints/step_40/ holds one file per rank and ``run.json``, which is written last: a folder without it is torn
and is never resumed from. The optimizer is stored as torch's own state per rank, whose load keeps one step counter per
parameter; megatron-core's distributed load shares a single one (optimizer/distrib_optimizer.py:821) and so counts it
once per parameter.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_rlvr.config import Config, ConfigError
from megatron_rlvr.distributed import collect
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.models.trainable import Trainable
from megatron_rlvr.run_folder import checkpoints

Models = Mapping[str, Trainable]  # {"policy": ..., "critic": ...}

KEEP = 2  # the newest, and the one before in case the newest turns out to be damaged


def layout(config: Config) -> dict[str, Any]:
    """What must be equal for rank files to fit."""
    parallel = config.parallel
    return {
        "tp": parallel.tp,
        "pp": parallel.pp,
        "vpp": parallel.vpp,
        "dp": parallel.dp,
        "distributed_optimizer": config.optimizer.distributed,
        "dtype": config.model.dtype,
        "critic_heads": config.critic.num_heads if config.has_critic else 0,
        "critic_distributed_optimizer": config.has_critic and config.critic.optimizer.distributed,
    }


def save(run: Path, config: Config, models: Models, groups: ParallelGroups, state: dict[str, Any]) -> Path:
    """Write RUN/checkpoints/step_N, N = state["step"]; ``state`` is the trainer's, equal on every rank. Collective."""
    target = run / "checkpoints" / f"step_{state['step']}"
    if groups.rank == 0:
        shutil.rmtree(target, ignore_errors=True)  # a torn one of an earlier attempt
        target.mkdir(parents=True)
    collect.barrier(groups.world)
    torch.save({name: _rank_state(model) for name, model in models.items()}, target / f"rank_{groups.rank}.pt")
    collect.barrier(groups.world)
    if groups.rank == 0:
        (target / "run.tmp").write_text(json.dumps({"layout": layout(config), **state}))
        (target / "run.tmp").rename(target / "run.json")
        for old in checkpoints(run)[:-KEEP]:
            shutil.rmtree(old)
    collect.barrier(groups.world)
    return target


def load(path: Path, config: Config, models: Models, groups: ParallelGroups) -> dict[str, Any]:
    """Bring the models back as they were; returns the trainer's state. Raises ConfigError when the layout differs."""
    state = json.loads((path / "run.json").read_text())
    saved, wanted = state.pop("layout"), layout(config)
    if saved != wanted:
        differing = [key for key in wanted if saved.get(key) != wanted[key]]
        changed = ", ".join(f"{key} {saved.get(key)} -> {wanted[key]}" for key in differing)
        raise ConfigError(
            f"{path} was saved in another layout ({changed}): resume with the same one, or start a new run"
        )
    saved_models = torch.load(path / f"rank_{groups.rank}.pt", weights_only=True)
    for name, model in models.items():
        _restore(model, saved_models[name])
    return state


def _rank_state(model: Trainable) -> dict[str, Any]:
    return {
        "model": [[parameter.detach() for parameter in chunk.parameters()] for chunk in model.chunks],
        "optimizers": [
            {
                "state": inner.state_dict(),
                # In bf16 these are the fp32 masters; in fp32 they are views of the model's own parameters.
                "parameters": [[parameter.detach() for parameter in group["params"]] for group in inner.param_groups],
            }
            for inner in _torch_optimizers(model)
        ],
        "scheduler": model.scheduler.state_dict(),
    }


def _restore(model: Trainable, saved: dict[str, Any]) -> None:
    with torch.no_grad():
        for chunk, tensors in zip(model.chunks, saved["model"], strict=True):
            for parameter, tensor in zip(chunk.parameters(), tensors, strict=True):
                parameter.copy_(tensor)
        for inner, stored in zip(_torch_optimizers(model), saved["optimizers"], strict=True):
            inner.load_state_dict(stored["state"])
            for group, tensors in zip(inner.param_groups, stored["parameters"], strict=True):
                for parameter, tensor in zip(group["params"], tensors, strict=True):
                    parameter.copy_(tensor)
    model.scheduler.load_state_dict(saved["scheduler"])


def _torch_optimizers(model: Trainable) -> list[torch.optim.Optimizer]:
    return [wrapped.optimizer for wrapped in model.optimizer.chained_optimizers]
