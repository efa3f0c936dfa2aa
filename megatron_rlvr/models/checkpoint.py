"""Training checkpoints read back: the newest usable one, in any layout, and in its own one bit for bit.

checkpoint_folder.py describes the folder. Parameters and optimizer lie in it in Megatron's distributed format
(torch_dist); what is not a tensor is JSON; nothing that is read back is a pickle that could run code.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_rlvr import checkpoint_folder
from megatron_rlvr.config import ConfigError
from megatron_rlvr.distributed import reduce, sharded_files
from megatron_rlvr.distributed.groups import ParallelGroups, group_rank
from megatron_rlvr.models import random_streams, sharded_state
from megatron_rlvr.models.trainable import Trainable
from megatron_rlvr.weights.megatron_folder import read_metadata

Models = Mapping[str, Trainable]  # {"policy": ..., "critic": ...}


def newest_usable(run: Path, models: Models, groups: ParallelGroups) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole and of these models, and what is wrong with each newer one. Collective."""
    problems: list[str] = []
    for path in reversed(checkpoint_folder.checkpoints(run)):
        found = checkpoint_folder.damage(path, groups.rank, groups.world_size)
        found = next(filter(None, reduce.gather_objects(found, groups.world)), "")
        if not found:
            found = next(filter(None, reduce.gather_objects(_misfit(path, models), groups.world)), "")
        if not found:
            return path, problems
        problems.append(f"{path} cannot be used: {found}")
    return None, problems


def load(path: Path, models: Models, groups: ParallelGroups) -> dict[str, Any]:
    """Bring the models back as they were, in whatever layout; returns what ``save`` was given. Collective.

    Random streams come back where the ranks are laid out as they were; they are only drawn from by dropout.
    """
    state = json.loads((path / "run.json").read_text())
    for name, model in models.items():
        read_tensors(tensors_of(model), path / name)
        progress = state["models"][name]
        sharded_state.set_updates(model, progress["updates"])
        model.scheduler.num_steps = 0
        model.scheduler.step(progress["scheduled"])
    if is_layout_of(groups, state["layout"]):
        random_streams.restore(torch.load(path / "rng" / f"rank_{groups.rank}.pt", weights_only=True))
    return state


def write_tensors(tensors: list[ShardedTensor], folder: Path, group: Any) -> None:
    """A folder in Megatron's distributed format from every rank's parts, each element once. Collective."""
    planner = MCoreSavePlanner(flatten_state_dict=False)
    sharded_files.write(mcore_to_pyt_state_dict(_by_key(tensors)), planner, folder, group)
    if group_rank(group) == 0:
        torch.save({}, folder / "common.pt")  # Megatron asks for it, and for metadata.json
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def read_tensors(tensors: list[ShardedTensor], folder: Path) -> None:
    """Fill this rank's parts, in place, from whatever parts the folder was written in. Collective."""
    padded = {item.key: item for item in tensors if item.allow_shape_mismatch}
    planner = MCoreLoadPlanner(allow_shape_mismatch_sharded_tensors=padded)
    wanted = mcore_to_pyt_state_dict(_by_key(tensors), is_loading=True)
    sharded_files.read(wanted, planner, folder, read_metadata(folder))


def shapes_of(models: Models) -> dict[str, Any]:
    """What must be equal for a checkpoint's tensors to be these models'."""
    return {
        name: {
            **dataclasses.asdict(model.architecture),
            "dtype": str(next(model.chunks[0].parameters()).dtype).removeprefix("torch."),
            "heads": getattr(model, "num_heads", 0),
        }
        for name, model in models.items()
    }


def _misfit(path: Path, models: Models) -> str:
    """How the checkpoint's tensors differ from what these models hold; "" if they do not."""
    saved, wanted = json.loads((path / "run.json").read_text())["shapes"], json.loads(json.dumps(shapes_of(models)))
    for name, model in models.items():
        if name not in saved:
            return f"it holds no {name}"
        for key, value in wanted[name].items():
            if saved[name].get(key) != value:
                return f"its {name} has {key} {saved[name].get(key)}, this run's has {value}"
        try:
            metadata = read_metadata(path / name)
        except ConfigError as error:
            return str(error)
        for tensor in tensors_of(model):
            if difference := _difference(tensor, metadata, model.architecture.vocab_size):
                return f"{name}/{tensor.key} {difference}"
    return ""


def _difference(tensor: ShardedTensor, metadata: Metadata, vocab_size: int) -> str:
    held = metadata.state_dict_metadata.get(tensor.key)
    if not isinstance(held, TensorStorageMetadata):
        return "is missing"
    found, wanted = tuple(held.size), tuple(tensor.global_shape)
    if found == wanted:
        return ""
    # How far the vocabulary is padded depends on tp: the rows beyond it are nobody's.
    if tensor.allow_shape_mismatch and found[1:] == wanted[1:] and min(found[0], wanted[0]) >= vocab_size:
        return ""
    return f"has shape {list(found)}, this run's has {list(wanted)}"


def tensors_of(model: Trainable) -> list[ShardedTensor]:
    return sharded_state.model_tensors(model) + sharded_state.optimizer_tensors(model)


def _by_key(tensors: list[ShardedTensor]) -> dict[str, list[ShardedTensor]]:
    grouped: dict[str, list[ShardedTensor]] = {}
    for tensor in tensors:
        grouped.setdefault(tensor.key, []).append(tensor)
    return grouped


def layout_of(groups: ParallelGroups) -> list[int]:
    return [groups.tp_size, groups.pp_size, groups.dp_size, groups.cp_size]


def is_layout_of(groups: ParallelGroups, saved: list[int]) -> bool:
    """Whether a checkpoint's ``layout`` is that of these groups; without a fourth number it is older than cp."""
    return [*saved, 1][:4] == layout_of(groups)
