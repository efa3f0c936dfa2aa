"""Which steps the figures of a run and of a comparison are over: the first and the last twenty, or fewer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_rlvr.pages.comparison import build_comparison
from megatron_rlvr.pages.key_figures import key_figures
from tests.pages.test_report import write_run


def ramp(steps: int) -> list[dict]:
    """Step 1 has the reward 1, step 2 the reward 2; every tenth step measures a tenth more than the one before."""
    return [
        {"step": step, "reward/mean": float(step)} | ({"eval/pass@1": step / 100} if step % 10 == 0 else {})
        for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize(
    ("steps", "value", "note"),
    [
        (100, "10.500 → 90.500", "first and last 20 steps, × 8.62"),
        (41, "10.500 → 31.500", "first and last 20 steps, × 3.00"),
        (40, "10.500 → 30.500", "first and last 20 steps, × 2.90"),
        (30, "8.000 → 23.000", "first and last 15 steps, × 2.88"),  # two ends that share no step
        (5, "1.500 → 4.500", "first and last 2 steps, × 3.00"),
        (3, "1.000 → 3.000", "first and last, × 3.00"),
        (1, "1.000", "measured once"),
    ],
)
def test_a_figure_compares_two_ends_of_a_run_that_share_no_step(steps: int, value: str, note: str):
    assert key_figures(ramp(steps))[0] == ("Reward", value, note)


def test_a_held_out_figure_compares_the_first_and_the_last_measured():
    assert key_figures(ramp(60))[1] == ("Held-out pass@1", "10.0% → 60.0%", "first and last, × 6.00")


def test_what_key_figures_say_beside_the_ends():
    rows = [{"step": 1, "reward/mean": -0.5, "rollout/log_prob_gap_max": 2e-6}]
    rows += [{"step": 2, "reward/mean": 0.5, "rollout/log_prob_gap_max": 7e-6}]
    rows += [{"step": 3, "reward/mean": 0.5, "rollout/log_prob_gap_max": 1e-6}]
    found = {name: figure for name, *figure in key_figures(rows)}
    assert found["Reward"] == ["-0.500 → 0.500", "first and last"]  # of what began below 0 there is no multiple
    assert found["Log-prob gap"][0] == "7.0e-06"
    held_out = [{"step": 1, "eval/pass@16": 0.6, "eval/pass@4": 0.4, "eval/pass@1": 0.1}]
    assert [name for name, _, _ in key_figures(held_out)] == [f"Held-out pass@{k}" for k in (1, 4, 16)]


def test_a_comparison_has_means_of_the_last_twenty_steps_and_the_held_out_figure_last_measured(tmp_path: Path):
    folders = []
    for name, steps in (("long", 55), ("short", 10)):
        gaps = [{"rollout/calibration_gap": 160.0 if step % 7 == 0 else 0.2} for step in range(steps)]
        folders.append(write_run(tmp_path / name, [row | gap for row, gap in zip(ramp(steps), gaps, strict=True)]))
    html = build_comparison(folders, tmp_path / "comparison.html").read_text(encoding="utf-8")
    head, long, short = re.findall(r"<tr.*?</tr>", html.partition("Figures")[2].partition("Warnings")[0])
    names = re.findall(r"<th[^>]*>(.*?)</th>", head)
    for row, reward, held_out in ((long, "45.500", "50.0%"), (short, "5.500", "10.0%")):  # 36 .. 55, and 1 .. 10
        cells = dict(zip(names, re.findall(r"<td[^>]*>(.*?)</td>", row), strict=True))
        assert (cells["reward"], cells["pass@1"]) == (reward, held_out)
        assert cells["calibration gap"] == "0.200"  # the median: some responses have a perplexity of hundreds
