"""PPO with four heads and both bonuses of CDE, with real Megatron and real vLLM."""

from __future__ import annotations

import math
from pathlib import Path

from tests.integration.conftest import metrics

PPO = "examples/countdown_cpu/ppo.yaml"


def test_three_steps(train, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = [
        "trainer.num_steps=3",
        "critic.warmup_steps=1",
        "critic.share=0.5",
        "reward.scale=signed",
        "exploration={cde: {critic: {}}}",
        f"run.dir={folder}",
    ]
    train(*overrides, config=PPO)
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert "policy/loss" not in rows[0]  # the critic warms up
    for row in rows:
        assert all(math.isfinite(value) for value in row.values()), row
        assert row["critic/grad_norm"] > 0 and row["critic/head_std"] > 0 and row["critic/explained_variance"] < 1
        assert row["cde/bonus"] > 0 and row["cde/critic_bonus"] > 0
        assert row["sync/verified"] is True
        assert row["time/values"] > 0 and row["time/critic"] > 0
    for row in rows[1:]:
        assert row["policy/grad_norm"] > 0
