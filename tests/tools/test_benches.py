"""The benches run, at shapes that measure nothing, and print the lines that they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 300.0  # seconds, on a machine with other work; 20 on an idle one


def run(tool: str, **options: object) -> list[dict]:
    """The JSON lines of a bench."""
    arguments: list[str] = []
    for name, value in options.items():
        arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # a script's own folder comes first, not the package's
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_token_statistics() -> None:
    *rows, ratios = run("bench_token_statistics", tokens=6, vocab=64, hidden=8, tp=2, rounds=1)
    found = {row["implementation"]: row for row in rows}
    assert set(found) == {"ours", "megatron", "megatron_fused", "copy", "linear", "linear_float32", "products"}
    assert found["ours"]["collectives"] == [2, 0] and found["megatron"]["collectives"] == [3, 0]
    assert found["linear"]["collectives"] == [2, 1] and found["products"]["collectives"] == [0, 0]
    assert all(row["tokens"] == 6 and row["tp"] == 2 and row["seconds"] >= 0 for row in rows)
    others = {"ours / megatron", "ours / megatron_fused", "ours / copy", "linear / products", "linear / linear_float32"}
    assert set(ratios) == others | {"ours, share of a copy's rate"}
    assert ratios["ours, share of a copy's rate"] == pytest.approx(2 / ratios["ours / copy"], abs=1e-3)


def test_peers_are_named_where_there_are_none(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/bench_token_statistics.py"), "--peers", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, cwd=ROOT)
    assert done.returncode != 0 and "none of the folders slime, verl, nemo_rl" in done.stderr


@pytest.mark.slow
def test_weight_sync() -> None:
    *syncs, medians = run("bench_weight_sync", layers=1, hidden=128, ffn=64, vocab=256, syncs=2, dtype="float32")
    assert len(syncs) == 2 and all(0 < row["proof_seconds"] < row["sync_seconds"] for row in syncs)
    # embedding and output layer, attention of one head with its query and key norms, gated MLP, three norms
    assert medians["parameters"] == 2 * 256 * 128 + 4 * 128 * 128 + 2 * 128 + 3 * 128 * 64 + 3 * 128
    assert medians["sync_seconds"] > 0 and medians["gib"] == round(4 * medians["parameters"] / 2**30, 3)


@pytest.mark.slow
def test_exploration() -> None:
    sizes = {"layers": 1, "hidden": 128, "ffn": 64, "vocab": 64, "length": 4, "microbatch_tokens": 32}
    *rows, ratios = run("bench_exploration", rounds=1, **sizes)
    found = {row["variant"]: row for row in rows}
    assert set(found) == {"grpo", "lp_reg", "lp_reg_released_code", "ppo_1_head", "ppo_16_heads"}
    # two updates of two microbatches, before them the old policy's pass: Lp-Reg makes none of its own
    assert {row["policy_forwards"] for row in rows} == {8}
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 for row in rows)
    assert {"lp_reg / grpo", "lp_reg_released_code / grpo", "ppo_16_heads / ppo_1_head"} <= set(ratios)


@pytest.mark.slow
def test_plan() -> None:
    """A third of the bench's size, where what every process takes besides weighs most."""
    layouts = ["one rank", "bf16", "tp 2, sequence parallel"]
    *rows, worst = run("bench_plan", layers=3, vocab=4096, layouts=layouts)
    assert [row["layout"] for row in rows] == layouts and [row["ranks"] for row in rows] == [1, 1, 2]
    for row in rows:
        assert row["predicted / measured"] == pytest.approx(1, abs=0.1) and row["state_share"] >= 0.5, row
    assert worst["worst"] in [row["predicted / measured"] for row in rows]


@pytest.mark.slow
def test_checkpoint() -> None:
    *saves, medians = run("bench_checkpoint", layers=1, hidden=128, ffn=64, vocab=256, tokens=256, saves=1)
    (row,) = saves
    assert row["mib"] > 1 and row["stall_seconds"] > 0 and row["update_seconds"] > 0
    assert all(row[name] > 0 for name in row if name.endswith("mib_per_second"))
    assert medians == {"tp": 1} | row


@pytest.mark.slow
def test_convert(tmp_path: Path) -> None:
    rows = {row["phase"]: row for row in run("bench_convert", folder=tmp_path / "bench", layers=2)}
    assert list(rows) == ["copy", "import", "export", "compare"] and not (tmp_path / "bench").exists()
    assert all(row["seconds"] > 0 and row["gib"] > 1 for row in rows.values())
    # the bound of what must be free: twice the largest file, and a GiB
    assert all(0 < rows[phase]["anon_mib"] < rows[phase]["bound_mib"] for phase in ("import", "export", "compare"))


def test_verify_on_hostile_rows() -> None:
    (mixed,) = run("bench_verify", only="mixed", rows=120, deadline=1.0, data="")
    assert mixed["rows"] == 120 and sum(mixed["statuses"].values()) == 120
    assert mixed["statuses"].keys() <= {"ok", "unparseable", "timeout"}
    assert mixed["rewarded"]["wrong"].startswith("0 of ")
    assert mixed["worst_row_seconds"] <= mixed["wall_deadline_seconds"] + 1
    assert mixed["largest_worker_mib"] < mixed["memory_limit_mib"]


@pytest.mark.slow
def test_verify() -> None:
    labelled, integers, mixed = run("bench_verify", rows=50, integers=200, cases=40, deadline=1.0, data="")
    assert labelled["cases"] == 40 and labelled["math"]["false_positives"] == 0
    assert set(labelled) >= {"math", "math_verify_alone", "dapo"}
    assert integers["rows"] == 200 and integers["rows_per_cpu_second"] > 0 and mixed["rows"] == 50


@pytest.mark.slow
def test_recorder() -> None:
    training, largest = run("bench_recorder", steps=1, tokens=64)
    assert training["columns"] > 10 and training["file_bytes"] > 1000 and 0 < training["overhead"] < 1
    assert (
        largest["tokens"] == 64 and largest["columns"] == 16 and largest["page_bytes"] > largest["file_bytes"] > 64 * 60
    )
