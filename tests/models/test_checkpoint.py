"""A resumed run is the uninterrupted one, bit for bit; what does not fit or is torn is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlvr.config import ConfigError
from megatron_rlvr.models import checkpoint
from megatron_rlvr.models.critic import Critic
from megatron_rlvr.run_folder import checkpoints
from megatron_rlvr.types import Microbatch
from tests.models.conftest import Case
from tests.models.layouts import Layout, make_batch, make_policy, megatron, run_update
from tests.models.layouts import weights as weights_of
from tests.ranks import run_ranks
from tests.tiny import make_config, make_folder

OPTIMIZER = {"lr": 1e-3, "warmup_steps": 4, "schedule": "cosine", "weight_decay": 0.1, "distributed": True}
STATE = {"step": 7, "prompt_position": 42, "exploration": {"lp_reg": {}}}


def _value_loss(micro: Microbatch, values: torch.Tensor) -> torch.Tensor:
    return ((values - micro.advantages[:, None]).square() * micro.loss_mask[:, None]).sum() / 100


def _resume(layout: Layout, case: Case, other: Path, dtype: str, run: Path) -> dict[str, bool]:
    """Three updates at once against one, a save, a load into other models, and two more: policy and critic."""

    def build(folder: Path) -> dict[str, Any]:
        sections = {
            "model": {"path": str(folder), "dtype": dtype},
            "optimizer": OPTIMIZER,
            "critic": {"num_heads": 3, "optimizer": OPTIMIZER},
            "trainer": {"num_steps": 10},
        }
        config = make_config(folder, {"parallel": vars(layout)} | sections)
        config.seed = len(folder.name)  # the head's weights are drawn from it
        return {"policy": make_policy(folder, layout, ranks, **sections), "critic": Critic(config, ranks)}

    def update(models: dict[str, Any], *numbers: int) -> list[dict[str, float]]:
        of_critic = [models["critic"].update(batch, batch.updates[number], _value_loss).means() for number in numbers]
        return of_critic + [run_update(models["policy"], batch, number) for number in numbers]

    def weights(models: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {f"{kind} {name}": item for kind in models for name, item in weights_of(models[kind]).items()}

    with megatron(layout) as ranks:
        batch = make_batch(case.groups, case.samples, layout, ranks, 60, updates=3)
        config = make_config(case.folder, {"parallel": vars(layout), "model": {"dtype": dtype}, "optimizer": OPTIMIZER})
        first = build(case.folder)
        update(first, 0)
        path = checkpoint.save(run, config, first, ranks, STATE)
        saved = weights(first)
        metrics, final = update(first, 1, 2), weights(first)
        second = build(other)
        state = checkpoint.load(path, config, second, ranks)
        loaded = weights(second)
        resumed_metrics, resumed = update(second, 1, 2), weights(second)
        return {
            "state": state == STATE,
            "loaded": all(loaded[name].equal(saved[name]) for name in saved),
            "moved on": not all(final[name].equal(saved[name]) for name in saved),
            "metrics": metrics == resumed_metrics,
            "weights": all(resumed[name].equal(final[name]) for name in final),
        }


@pytest.mark.parametrize(
    "layout, dtype",
    [
        (Layout(tp=2), "float32"),
        (Layout(dp=2), "float32"),
        (Layout(dp=2), "bfloat16"),
        (Layout(pp=2, vpp=2), "float32"),
        (Layout(tp=2, dp=2), "bfloat16"),
    ],
    ids=str,
)
def test_resuming_is_bit_identical(layout: Layout, dtype: str, cases: dict[str, Case], tmp_path: Path) -> None:
    # same shape, other weights: what a load forgets stays visible
    other, case = make_folder(tmp_path / "other", "qwen3", tied=True, seed=1), cases["qwen3-tied"]
    for results in run_ranks(layout.ranks, _resume, layout, case, other, dtype, tmp_path / "run", timeout=60):
        assert results == dict.fromkeys(results, True)


def _save_several(case: Case, run: Path) -> list[str]:
    layout = Layout()
    with megatron(layout) as ranks:
        config = make_config(case.folder)
        models = {"policy": make_policy(case.folder, layout, ranks)}
        for step in (9, 10, 11):
            checkpoint.save(run, config, models, ranks, {"step": step})
        torn = checkpoint.save(run, config, models, ranks, {"step": 12})
        (torn / "run.json").unlink()
        found = [path.name for path in checkpoints(run)]
        checkpoint.save(run, config, models, ranks, {"step": 12})  # over the torn one
        moved = make_config(case.folder, {"parallel": {"tp": 2}, "optimizer": {"distributed": False}})
        with pytest.raises(ConfigError, match=r"step_12 .*tp 1 -> 2, distributed_optimizer True -> False"):
            checkpoint.load(checkpoints(run)[-1], moved, models, ranks)
        ppo = make_config(case.folder, {"algorithm": {"advantage": "gae"}, "critic": {"num_heads": 4}})
        with pytest.raises(ConfigError, match=r"step_12 .*critic_heads 0 -> 4"):
            checkpoint.load(checkpoints(run)[-1], ppo, models, ranks)
        return found


def test_torn_old_and_foreign_checkpoints(cases: dict[str, Case], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert checkpoints(run) == []
    ((*_, newest),) = run_ranks(1, _save_several, cases["qwen3-tied"], run, timeout=60)
    assert newest == "step_11"  # never the torn step_12
    assert [path.name for path in checkpoints(run)] == ["step_11", "step_12"]
    assert json.loads((run / "checkpoints" / "step_12" / "run.json").read_text())["step"] == 12
