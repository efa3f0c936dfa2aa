"""The planner beside published figures; what no config says, the mean response, is half of the longest."""

from __future__ import annotations

import pytest

from megatron_rlvr.planner import memory, times
from megatron_rlvr.planner.devices import DEVICES
from megatron_rlvr.planner.workload import Workload, forward_flops, stage_parameters
from tests.planner.test_plan import QWEN32, plan


@pytest.mark.parametrize(
    ("name", "overrides", "gpus", "published"),
    [
        # arXiv 2510.03222v2 Sec 5.1: GPU-hours of its runs on H20
        ("lp_reg/qwen2.5_32b/lp_reg_on", "", 64, 16_000),
        ("lp_reg/qwen3_14b/lp_reg_on", "parallel.dp=8", 32, 8_000),
    ],
)
def test_gpu_hours_of_the_papers_runs(name: str, overrides: str, gpus: int, published: float) -> None:
    floor, expected = plan(name, overrides, gpus, "h20").gpu_hours
    assert floor < published and expected == pytest.approx(published, rel=0.3)


@pytest.mark.parametrize(
    ("distributed", "dtype", "bytes_per_parameter"),
    [
        # Megatron-core's distributed optimizer guide, d = 8
        (True, "bfloat16", 6 + 12 / 8),
        (False, "bfloat16", 18),
        (True, "float32", 8 + 8 / 8),
        (False, "float32", 16),
    ],
)
def test_bytes_per_parameter_of_megatrons_guide(distributed: bool, dtype: str, bytes_per_parameter: float) -> None:
    found = plan(QWEN32, f"optimizer.distributed={str(distributed).lower()} model.dtype={dtype}")
    items = memory.state_items(found.config, found.workload, 0)
    total = stage_parameters(found.workload.policy, 8, 1, 0)
    assert sum(item.bytes for item in items) == pytest.approx(bytes_per_parameter * total, rel=1e-6)


def test_update_and_log_probs_of_a_published_step() -> None:
    """verl docs/advance/one_step_off.md, Qwen2.5-Math-7B on 32 H20: update 344 s, old log-probs 119 s."""
    found = plan(
        "lp_reg/qwen3_14b/grpo_off", "model.path=Qwen2.5-7B parallel.tp=4 parallel.dp=8 model.recompute=none", 32, "h20"
    )
    seconds = {phase.name: phase.expected for phase in found.phases}
    assert seconds["update"] / seconds["log_probs"] == pytest.approx(344 / 119, rel=0.1)


def test_training_comes_to_a_published_share_of_the_peak() -> None:
    """MFU, recomputation not counted: 0.40 to 0.31 in verl docs/perf/dpsk.md, 0.36 in prime-rl's benchmarks."""
    found = plan("cde/grpo_ppl", "model.recompute=none", 8)
    update = next(phase for phase in found.phases if phase.name == "update")
    assert 0.31 <= update.flops / (update.expected * 8 * found.machine.device.flops) <= 0.40


def test_bytes_of_a_32b_sync() -> None:
    """65.5 GB in bf16 for Qwen2.5-32B; verl's fastest published sync of 32B takes 6 to 12 s."""
    found = plan(QWEN32)
    assert times.sync_bytes(found.config, found.workload) == pytest.approx(65.5e9, rel=0.001)
    sync = next(phase for phase in found.phases if phase.name == "weight_sync")
    assert sync.floor < 6


def test_logits_that_are_held_or_not() -> None:
    """SkyRL's pull request 1841: a quarter of a 248k vocabulary at 131k tokens takes 2 B x 131,072 x 62,000 in bf16."""
    config = plan("cde/grpo_ppl", "trainer.microbatch_tokens=131072 rollout.prompts_per_step=256", 8).config
    model, device = Workload.of(config).policy, DEVICES["h100"]
    config.model.logits = "materialised"
    held = memory.head_bytes(config, model, device)
    config.model.logits = "fused"
    assert held > 2 * 131072 * model.vocab_size / 2 > 15 * memory.head_bytes(config, model, device) / 4


def test_a_pass_has_the_flops_of_six_per_parameter_and_token() -> None:
    """arXiv 2001.08361: training costs about 6 N D, attention aside."""
    model = Workload.of(plan(QWEN32).config).policy
    embedding = model.vocab_size * model.hidden_size
    assert 3 * forward_flops(model, 1, 0) == pytest.approx(6 * (32.76e9 - embedding), rel=0.001)
