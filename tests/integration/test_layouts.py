"""Whole steps with real Megatron and real vLLM: the same rollouts, losses and gradients in every layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rlvr.token_records import TokenRecord, read_record
from tests.integration.conftest import metrics, rollouts

EQUAL = ["policy/loss", "policy/grad_norm", "policy/entropy", "reward/mean", "tokens/response_mean", "lp_reg/share"]


def close(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-5, abs_tol=1e-7)


def test_layouts_give_the_same_rollouts_losses_and_gradients(train, tmp_path: Path) -> None:
    """One rank, four (tp 2, pp 2: two engine replicas of two ranks) and two that share a microbatch's tokens (cp 2)."""
    folders = {}
    for name, (tp, pp, cp, engine_tp) in {"one": (1, 1, 1, 1), "four": (2, 2, 1, 2), "two": (1, 1, 2, 1)}.items():
        folders[name] = tmp_path / name
        train(
            "trainer.num_steps=3",
            f"parallel.tp={tp}",
            f"parallel.pp={pp}",
            f"parallel.cp={cp}",
            f"rollout.tp={engine_tp}",
            "trainer.log_rollouts=256",
            f"run.dir={folders[name]}",
        )
    one, *others = folders.values()
    assert [row["step"] for row in metrics(one)] == [1, 2, 3]
    assert len(sampled(one)) == 3 * 256
    for other in others:
        check_recordings(read_record(one, 1), read_record(other, 1))
        assert sampled(other) == sampled(one)
        for left, right in zip(metrics(one), metrics(other), strict=True):
            for key in EQUAL:
                assert close(left[key], right[key]), (other.name, left["step"], key, left[key], right[key])
            for row in (left, right):
                assert row["sync/verified"] is True
                assert row["rollout/log_prob_gap_max"] < 1e-4
                assert row["policy/grad_norm"] > 0


def sampled(folder: Path) -> list[tuple[str, int, str]]:
    return [(row["prompt_id"], row["sample"], row["response"]) for row in rollouts(folder)]


def check_recordings(one: TokenRecord, other: TokenRecord) -> None:
    """The flight recorder kept the same of the same step, whatever the ranks were."""
    assert one.texts == other.texts and len(one.responses) == 8
    assert {"lp_reg/selected", "kept_mass", "ratio", "advantage", "rank"} <= one.columns.keys() == other.columns.keys()
    for name, column in one.columns.items():
        assert torch.allclose(column.double(), other.columns[name].double(), atol=1e-4, rtol=1e-4), name


def test_one_update_per_rollout_with_and_without_a_pass_of_the_old_policy(train, tmp_path: Path) -> None:
    """Two data-parallel ranks under torchrun; 80/20 with a share of one selects every token, but asks for the pass."""
    common = ["trainer.num_steps=2", "trainer.updates_per_rollout=1", "parallel.tp=1", "parallel.dp=2"]
    held_out = [
        "data.eval_path=examples/countdown_cpu/build/eval.jsonl",
        "trainer.eval_every=0",
        "trainer.eval_responses=2",
        "logging.tensorboard=true",
    ]
    without, with_pass = tmp_path / "without", tmp_path / "with"
    train(*common, *held_out, "exploration=null", f"run.dir={without}", torchrun=2)
    train(*common, "exploration={high_entropy: {share: 1.0}}", f"run.dir={with_pass}")
    for row, other in zip(metrics(without), metrics(with_pass), strict=True):
        assert "time/log_probs" not in row and other["time/log_probs"] > 0
        assert other["high_entropy/left_out"] == 0
        assert abs(other["policy/ratio_max"] - 1) < 1e-6  # two forwards, one policy
        for key in ("policy/loss", "policy/grad_norm", "policy/entropy", "reward/mean"):
            assert close(row[key], other[key]), (row["step"], key, row[key], other[key])
        assert row["rollout/log_prob_gap_max"] < 1e-4
        assert row["sync/verified"] is True
    summary = json.loads((without / "summary.json").read_text())
    assert 0 < summary["eval/pass@1"] < summary["eval/pass@2"] < 1
    (told,) = EventAccumulator(str(without / "tensorboard")).Reload().Scalars("eval/pass@1")
    assert told.step == 3 and close(told.value, summary["eval/pass@1"])
    assert (without / "hf" / "config.json").exists()
    assert "<svg" in (without / "report.html").read_text()
