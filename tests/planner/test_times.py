"""Seconds of a step beside those that follow from the bytes and the FLOPs by hand."""

from __future__ import annotations

import pytest

from megatron_rlvr.planner import times
from tests.planner.test_plan import CDE, QWEN32, plan

PARAMETERS = 32_763_876_352  # of Qwen2.5-32B
LINK, NETWORK = 450e9, 50e9  # bytes/s of an H100


def test_a_bubble_shrinks_with_the_microbatches_and_with_interleaving() -> None:
    config = plan(CDE, "parallel.pp=4 parallel.dp=1", 8).config
    found = []
    for pp, vpp, microbatch_tokens in ((1, 1, 20480), (4, 1, 20480), (4, 3, 20480), (4, 3, 5120 * 2048)):
        config.parallel.pp, config.parallel.vpp, config.trainer.microbatch_tokens = pp, vpp, microbatch_tokens
        found.append(times.bubble(config))
    # 2,048 responses, four of the longest fill a microbatch; at last one microbatch holds all, and three stand empty
    assert found == pytest.approx([0, 3 / (512 + 3), 3 / (3 * 512 + 3), 3 / (3 * 4 + 3)])


def test_every_update_reduces_gradients_and_gathers_weights_anew() -> None:
    """Fp32 gradients and bf16 weights of a rank, 7/8 of them over the network, of which half the speed is expected."""
    found = plan(QWEN32)

    def seconds(updates: int) -> float:
        found.config.trainer.updates_per_rollout = updates
        phases = times.phases(found.config, found.workload, found.machine.device, found.lengths)
        return next(phase.expected for phase in phases if phase.name == "update")

    once = (4 + 2) * PARAMETERS / 8 * 7 / 8 / NETWORK / 0.5
    assert seconds(2) - seconds(1) == pytest.approx(once, rel=1e-3)
    assert seconds(8) - seconds(1) == pytest.approx(7 * once, rel=1e-3)


def test_a_critic_moves_no_output_layer() -> None:
    found = plan("cde/ppo_both")

    def seconds(name: str, updates: int) -> float:
        found.config.trainer.updates_per_rollout = updates
        phases = times.phases(found.config, found.workload, found.machine.device, found.lengths)
        return next(phase.expected for phase in phases if phase.name == name)

    once = [seconds(name, 2) - seconds(name, 1) for name in ("critic update", "update")]
    assert found.workload.policy.tied and once[0] == pytest.approx(once[1], rel=1e-3)  # an embedding, once, in both


def test_stages_of_several_nodes_sync_over_the_network() -> None:
    found = plan(QWEN32, "parallel.tp=4 parallel.pp=2 parallel.dp=8")

    def seconds(replicas: int) -> float:
        found.config.parallel.dp = replicas
        return times.weight_sync(found.config, found.workload, found.machine.device).floor

    half = 2 * PARAMETERS / 2  # bytes of the stage that a rank is not in
    assert seconds(8) - seconds(1) == pytest.approx(half / NETWORK - half / LINK, rel=1e-6)


def test_sequences_that_run_together() -> None:
    found = plan(QWEN32)

    def running(most: int) -> int:
        found.config.rollout.max_running = most
        return times.running_sequences(found.config, found.workload, found.machine.device, found.lengths)

    assert running(7) == 7
    found.config.rollout.gpu_memory_utilization = 0.01
    assert running(7) == 1  # the least there can be
    found.config.rollout.gpu_memory_utilization = 0.6
    assert running(100) == 100
