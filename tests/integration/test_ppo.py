"""PPO with four heads and much of what methods may ask for, with real Megatron and real vLLM.

Both bonuses of CDE and its count-based baseline; Lp-Reg with the engine's own proxy.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from megatron_rlvr.pages.report_charts import PHASES
from megatron_rlvr.token_records import read_record
from tests.integration.conftest import metrics

PPO = "examples/countdown_cpu/ppo.yaml"


def test_three_steps(train, countdown: Path, tmp_path: Path) -> None:
    folder, problems = tmp_path / "run", (countdown / "eval.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "five.jsonl").write_text("".join(problems[:5]))
    trained = (countdown / "train.jsonl").read_text().splitlines(keepends=True)[:1]
    (tmp_path / "three.jsonl").write_text("".join(problems[5:7] + trained))
    overrides = [
        "trainer.num_steps=3",
        "critic.warmup_steps=1",
        "critic.share=0.5",
        "reward.scale=signed",
        "exploration={cde: {critic: {}}, sim_hash: {}}",
        "exploration.lp_reg={proxy_source: rollout, divergence: k3_sampled, rho: 0.3}",
        f"data.eval_sources=[{{path: {tmp_path}/five.jsonl}}, {{path: {tmp_path}/three.jsonl}}]",
        "trainer.eval_every=2",
        "logging.record_responses=256",
        f"run.dir={folder}",
    ]
    said = train(*overrides, config=PPO)
    assert "1 of the 3 held-out prompts of three are trained on too" in said and "prompts of five" not in said
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert "policy/loss" not in rows[0]  # the critic warms up
    for row in rows:
        assert all(math.isfinite(value) for value in row.values()), row
        assert row["critic/grad_norm"] > 0 and row["critic/head_std"] > 0 and row["critic/explained_variance"] < 1
        assert row["cde/bonus"] > 0 and row["cde/critic_bonus"] > 0
        assert row["sync/verified"] is True
        assert {name for name in row if name.startswith("time/")} <= {"time/step", *PHASES}
        assert row["time/values"] > 0 and row["time/critic"] > 0
        assert 0 < row["sim_hash/largest_share"] <= 1 and 0 < row["sim_hash/bonus"] <= 0.1 and row["time/states"] > 0
    for row in (rows[0], rows[2]):  # the critic looks at held-out responses too
        assert 0 < row["eval/head_std"] < 1 and row["eval/explained_variance"] < 1
        assert row["eval/five/head_std"] > 0 and row["eval/three/head_std"] > 0  # and at each source by itself
        for name in ("pass@1", "maj@16", "distinct"):
            parts = 5 * row[f"eval/five/{name}"] + 3 * row[f"eval/three/{name}"]
            assert abs(parts - 8 * row[f"eval/{name}"]) < 1e-9, name
    assert 0 < json.loads((folder / "summary.json").read_text())["eval/head_std"] < 1
    for row in rows[1:]:
        assert row["policy/grad_norm"] > 0
        assert row["lp_reg/candidates"] > 0 and row["lp_reg/cut_share"] == 0  # the engine gave its whole vocabulary
    assert all(recorded_means(folder, row["step"], row) < 1e-5 for row in rows)
    first, second = read_record(folder, 1).columns, read_record(folder, 2).columns
    assert "ratio" not in first and "ratio" in second  # a step of warm-up takes no loss of the policy


def recorded_means(folder: Path, step: int, row: dict) -> float:
    """The largest difference between a metric and the mean of its column, where every response is recorded."""
    record = read_record(folder, step)
    assert len(record.responses) == 256
    metrics_of = {"value_std": "critic/head_std", "cde/critic_bonus": "cde/critic_bonus", "entropy": "policy/entropy"}
    return max(abs(float(record.columns[name].mean()) - row[metric]) for name, metric in metrics_of.items())
