"""Recomputed activations change nothing, dropout included; and bf16 builds, steps and goes the right way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_rlvr import platform
from megatron_rlvr.distributed.groups import ParallelGroups
from tests.models.conftest import Case
from tests.models.layouts import (
    OPTIONS,
    STILL,
    Layout,
    gradients,
    make_batch,
    make_policy,
    megatron,
    run_update,
    weights,
)
from tests.ranks import run_ranks

MODES = ("none", "selective", "full")
TOKENS = 80


def _gradients_by_mode(layout: Layout, case: Case) -> dict[float, dict[str, Any]]:
    """dropout -> recompute mode -> (loss, gradients), all from the same random streams."""
    return {dropout: {mode: _run(layout, case, dropout, mode) for mode in MODES} for dropout in (0.0, 0.1)}


def _run(layout: Layout, case: Case, dropout: float, mode: str) -> tuple[float, dict[str, Any]]:
    with megatron(layout) as ranks:
        model = {"path": str(case.folder), "dtype": "float32", "recompute": mode, "dropout": dropout}
        policy = make_policy(case.folder, layout, ranks, model=model, optimizer=STILL)
        batch = make_batch(case.groups, case.samples, layout, ranks, TOKENS)
        loss = run_update(policy, batch)["policy/loss"]
        policy.fill_log_probs(batch, OPTIONS)
        first = batch.old_log_probs
        policy.fill_log_probs(batch, OPTIONS)
        assert first.equal(batch.old_log_probs), "a pass without gradients has no dropout"
        return loss, {name: value.numpy() for name, value in gradients(policy).items()}


RECOMPUTED = [Layout(tp=2), Layout(tp=2, sequence_parallel=True), Layout(pp=2, vpp=2), Layout(cp=2)]


@pytest.mark.parametrize("layout", RECOMPUTED, ids=str)
def test_recompute_gives_the_same_loss_and_gradients(layout: Layout, cases: dict[str, Case]) -> None:
    case = cases["qwen3-tied"]
    results = run_ranks(layout.ranks, _gradients_by_mode, layout, case, timeout=90)
    for by_dropout in results:
        for dropout, found in by_dropout.items():
            loss, wanted = found["none"]
            assert (abs(loss - case.loss) > 1e-3) == (dropout > 0)  # dropout really drops
            for mode in ("selective", "full"):
                assert found[mode][0] == loss, (dropout, mode)
                for name, value in wanted.items():
                    gap = abs(found[mode][1][name] - value).max()
                    assert gap <= 1e-6 * abs(value).max(), (dropout, mode, name)
    if layout.tp > 1:
        first, second = (by_dropout[0.1]["none"][1] for by_dropout in results)
        norms = [name for name in first if "layernorm" in name]
        assert norms and all((first[name] == second[name]).all() for name in norms)  # else the copies drift apart


STREAMS = [Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(cp=2)]


def _streams() -> list[tuple[list[float], list[float]]]:
    """Per layout three draws of the default stream and three of the tensor-parallel one."""
    return [_draws(layout) for layout in STREAMS]


def _draws(layout: Layout) -> tuple[list[float], list[float]]:
    with megatron(layout), platform.megatron_calls():
        default = torch.rand(3).tolist()
        with get_cuda_rng_tracker().fork():
            return default, torch.rand(3).tolist()


def test_dropout_streams_differ_where_masks_should_and_agree_where_they_must() -> None:
    first, second = run_ranks(2, _streams, timeout=30)
    agree = {
        str(layout): [a == b for a, b in zip(*pair, strict=True)]
        for layout, *pair in zip(STREAMS, first, second, strict=True)
    }
    assert agree == {str(STREAMS[0]): [True, False]} | {str(layout): [False, False] for layout in STREAMS[1:]}


def _train_in_bf16(layout: Layout, case: Case) -> dict[str, Any]:
    with megatron(layout) as ranks:
        policy = make_policy(
            case.folder,
            layout,
            ranks,
            model={"path": str(case.folder), "dtype": "bfloat16"},
            optimizer={"lr": 1e-3, "clip_grad": 1.0},
        )
        batch = make_batch(case.groups, case.samples, layout, ranks, TOKENS)
        before = weights(policy)
        losses = [run_update(policy, batch)["policy/loss"] for _ in range(4)]
        gap = _log_prob_gap(policy, case, layout, ranks)
        after = weights(policy)
        return {
            "dtypes": {str(tensor.dtype) for tensor in after.values()},
            "losses": losses,
            "unmoved": [name for name in after if after[name].equal(before[name])],
            "finite": all(tensor.isfinite().all() for tensor in after.values()),
            "gap": gap,
        }


def _log_prob_gap(policy: Any, case: Case, layout: Layout, ranks: ParallelGroups) -> float:
    """Mean |log-prob - fp64's| of a policy freshly loaded: here only the order of magnitude counts."""
    fresh = make_policy(case.folder, layout, ranks, model={"path": str(case.folder), "dtype": "bfloat16"})
    batch = make_batch(case.groups, case.samples, layout, ranks, TOKENS)
    fresh.fill_log_probs(batch, OPTIONS)
    gaps = [
        (batch.old_log_probs[batch.loss_mask & (batch.response_index == place)] - case.log_probs[identity]).abs()
        for place, identity in enumerate(batch.response_ids.tolist())
        if identity in case.samples
    ]
    return float(torch.cat(gaps).mean())


@pytest.mark.parametrize("layout", [Layout(tp=2, sequence_parallel=True), Layout(pp=2), Layout(dp=2)], ids=str)
def test_bf16_steps(layout: Layout, cases: dict[str, Case]) -> None:
    case = cases["qwen3-tied"]
    for found in run_ranks(layout.ranks, _train_in_bf16, layout, case, timeout=60):
        assert found["dtypes"] == {"torch.bfloat16"}
        assert found["losses"][0] == pytest.approx(case.loss, abs=0.1), found
        assert found["losses"][-1] < found["losses"][0] - 0.05, found  # four updates on one batch
        assert found["finite"]
        assert found["gap"] < 0.1, found
        assert not [name for name in found["unmoved"] if "weight" in name and "norm" not in name]
