"""The comparison's bookkeeping: what it keeps of a run, its intervals, and where table and plots go."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples/compare_exploration"


@pytest.fixture
def compare(tmp_path: Path) -> ModuleType:
    """compare.py, with a folder of its own to write to."""
    spec = importlib.util.spec_from_file_location("compare_exploration", EXAMPLE / "compare.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.HERE, module.RESULTS, module.README = tmp_path, tmp_path / "results", tmp_path / "README.md"
    module.README.write_text(f"before\n{module.START}\nold\n{module.END}\nafter\n")
    module.RESULTS.mkdir()
    return module


def write_run(folder: Path, steps: int, entropy: float) -> None:
    rows = [{"step": step, "reward/mean": step / 10, "policy/entropy": entropy} for step in range(1, steps + 1)]
    rows[0] |= {"eval/pass@1": 0.1, "eval/pass@16": 0.5, "eval/distinct": 9.0, "eval/distinct_right": 1.0}
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = {"eval/pass@1": 0.2, "eval/pass@16": 0.6, "eval/distinct": 8.0, "eval/distinct_right": 2.0}
    (folder / "summary.json").write_text(json.dumps({"steps": steps} | last))


def test_what_is_kept_of_a_run(compare: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=25, entropy=0.5)
    kept = compare.summary(tmp_path / "run")
    assert kept["curves"] == {"reward/mean": [0.55, 1.55, 2.3], "policy/entropy": [0.5, 0.5, 0.5]}
    assert [point["step"] for point in kept["held_out"]] == [0, 25]
    assert kept["held_out"][0]["eval/pass@1"] == 0.1 and kept["held_out"][1]["eval/pass@1"] == 0.2
    assert kept["final"]["policy/entropy"] == 0.5


def test_intervals(compare: ModuleType) -> None:
    assert compare.interval([0.25]) == "0.250"
    assert compare.interval([1.0, 2.0, 3.0]) == "2.000 ± 2.483"  # 4.30 / sqrt 3


def test_the_report(compare: ModuleType, tmp_path: Path) -> None:
    assert compare.report(25) == 1  # nothing to report
    for method, seed, entropy in (("grpo", 0, 0.5), ("grpo", 1, 0.7), ("lp_reg", 0, 0.9)):
        write_run(tmp_path / f"{method}-{seed}", 25, entropy)
        result = {"method": method, "seed": seed, "steps": 25, "seconds": 1}
        path = compare.result_path(method, seed, 25)
        path.write_text(json.dumps(result | compare.summary(tmp_path / f"{method}-{seed}")))
    assert compare.report(25) == 0
    text = compare.README.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| grpo | 2 | 0.200 ± 0.000 |" in text and "| lp_reg | 1 | 0.200 |" in text
    assert (tmp_path / "curves.png").stat().st_size > 1000 and "<svg" in (tmp_path / "curves.svg").read_text()


def test_every_method_has_its_file(compare: ModuleType) -> None:
    methods = {path.stem for path in (EXAMPLE / "methods").glob("*.yaml")}
    wanted = {"grpo", "grpo_entropy", "clip_higher", "high_entropy", "kl_cov", "gspo", "lp_reg", "lp_reg_released_code"}
    assert wanted | {"lp_reg_target_share", "cde_actor", "cde_critic", "ppo"} == methods


def test_the_committed_table_is_that_of_the_committed_results(compare: ModuleType) -> None:
    by_method: dict[str, list[dict]] = {}
    for path in sorted((EXAMPLE / "results").glob("*.json")):
        result = json.loads(path.read_text())
        by_method.setdefault(result["method"], []).append(result)
    assert {result["steps"] for results in by_method.values() for result in results} == {200}
    assert all([result["seed"] for result in results] == [0, 1, 2] for results in by_method.values())
    shown = (EXAMPLE / "README.md").read_text().partition(compare.START)[2].partition(compare.END)[0]
    assert shown.strip() == compare.table(by_method, 200).strip()
