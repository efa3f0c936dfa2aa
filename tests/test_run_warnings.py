"""Each warning fires on a run made to have its fault, at the step where it begins; a healthy run raises none."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_rlvr import run_warnings
from megatron_rlvr.records import read_rows
from megatron_rlvr.run_warnings import CHECKS, WINDOW, trend, warnings

STEPS, FAULT = 200, 80  # the fault begins at this step


def healthy(seed: int = 0) -> list[dict]:
    """Rows as those of a run that learns: reward up, entropy down by half, everything noisy, one bad step in ten."""
    draw = random.Random(seed)
    rows = []
    for step in range(1, STEPS + 1):
        done, noise = step / STEPS, draw.gauss(0, 1)
        row = {"step": step, "reward/mean": 0.12 + 0.2 * done + 0.04 * noise, "reward/std": 0.3}
        row |= {"policy/entropy": 0.7 - 0.35 * done + 0.03 * noise, "tokens/response_mean": 6 + 0.1 * noise}
        row |= {"rollout/calibration_gap": 2.0 - done + abs(0.5 * noise), "rollout/truncated_share": 0.01}
        row |= {"rollout/log_prob_gap_mean": 3e-7 * (1 + abs(noise)), "lp_reg/share": 0.05 * abs(noise)}
        row["reward/right_share"] = row["reward/mean"]
        row |= {"verifier/ok_share": 0.98, "verifier/error_share": 0.0, "verifier/timeout_share": 0.0}
        row |= {"cde/bonus": 0.1 * (1 - done), "cde/omega": 1 - done, "cde/critic_bonus": 0.01, "cde/critic_omega": 0.5}
        if step % 10 == 0:
            row |= {"reward/std": 0.0, "lp_reg/share": 0.0, "verifier/timeout_share": 0.02}
            row |= {"policy/entropy": 0.05, "rollout/log_prob_gap_mean": 1e-3}
        if step % 40 == 1:
            row["eval/pass@1"] = 0.1 + 0.2 * done
        rows.append(row)
    return rows


def broken(change, seed: int = 0) -> list[dict]:
    """The same run with ``change(row, how far the fault has gone, 0 .. 1)`` from FAULT on."""
    rows = healthy(seed)
    for row in rows:
        if row["step"] >= FAULT:
            row |= change(row, (row["step"] - FAULT) / (STEPS - FAULT))
    return rows


FAULTS = {
    "entropy_collapse": lambda row, far: {"policy/entropy": 0.02},
    "entropy_explosion": lambda row, far: {"policy/entropy": 4.0},
    "calibration_collapse": lambda row, far: {"rollout/calibration_gap": -0.01},
    "length_without_reward": lambda row, far: {"tokens/response_mean": 15.0, "reward/mean": 0.12},
    "format_hacking": lambda row, far: {"reward/mean": 0.5, "reward/right_share": 0.5, "verifier/ok_share": 0.98},
    "reward_hacking": lambda row, far: (
        {"reward/mean": 0.6} | ({"eval/pass@1": 0.05 - 0.03 * far} if "eval/pass@1" in row else {})
    ),
    "truncation": lambda row, far: {"rollout/truncated_share": 0.6},
    "log_prob_gap": lambda row, far: {"rollout/log_prob_gap_mean": 0.02 + 0.1 * far},
    "verifier_errors": lambda row, far: {"verifier/error_share": 0.05},
    "dead_method": lambda row, far: {"lp_reg/share": 0.0},
    "no_signal": lambda row, far: {"reward/std": 0.0},
}


def test_every_check_has_a_fault():
    assert {check.__name__ for check in CHECKS} == set(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_fault_is_found_where_it_begins(name, seed):
    rows = broken(FAULTS[name], seed)
    if name == "format_hacking":  # half of the answers could not be read at first, and just as many of the others
        for row in rows[: FAULT - 1]:
            row |= {"reward/mean": 0.25, "reward/right_share": 0.25, "verifier/ok_share": 0.49}
    check = getattr(run_warnings, name)
    assert check(rows[: FAULT - 1]) is None
    found = check(rows)
    assert found is not None
    # a mean over the last WINDOW steps crosses its limit at most so many steps later; held-out figures are rare
    latest = FAULT + (80 if name == "reward_hacking" else WINDOW)
    assert FAULT <= found.step <= latest, found
    assert found.found and found.why.endswith(".")
    assert found in warnings(rows)


@pytest.mark.parametrize(
    ("fault", "title"),
    [
        ({"rollout/truncated_share": 0.98}, "Responses are cut off"),
        ({"rollout/log_prob_gap_mean": 2.0}, "Log-prob gap"),
    ],
)
def test_what_is_wrong_from_the_first_step_on_is_told(fault, title):
    rows = [row | fault for row in healthy()]
    assert [(found.step, found.title) for found in warnings(rows)] == [(1, title)]
    assert [found.title for found in warnings(rows[:12])] == [title]


@pytest.mark.parametrize("seed", range(4))
def test_a_healthy_run_raises_none(seed):
    assert warnings(healthy(seed)) == []


def test_a_real_run_raises_none():
    """Sixty steps of the countdown demo: reward .12 to .17, entropy .64 to .42 nats, held-out pass@1 .11 to .21."""
    rows = read_rows(Path(__file__).with_name("countdown_metrics.jsonl"))
    assert len(rows) == 60 and rows[0].keys() >= {"reward/mean", "policy/entropy", "lp_reg/share", "eval/pass@1"}
    assert warnings(rows) == []


def test_a_trend_is_of_twenty_steps_at_either_end():
    ramp = trend([{"step": step, "policy/entropy": float(step)} for step in range(1, 51)], "policy/entropy")
    assert ramp.first == 10.5  # 1 .. 20
    assert ramp.recent[[0, 4, 19, 20, 49]].tolist() == pytest.approx([1.0, 3.0, 10.5, 11.5, 40.5])


@pytest.mark.parametrize(("steps", "is_told"), [(9, False), (10, True)])
def test_a_fault_is_told_when_it_has_lasted_ten_steps(steps, is_told):
    rows = [{"step": step, "reward/std": 0.3} for step in range(1, 41)]
    rows += [{"step": step, "reward/std": 0.0} for step in range(41, 60 + steps)]  # a mean of 20 is 0 from the 20th on
    assert (run_warnings.no_signal(rows) is not None) == is_told


def test_an_entropy_that_was_next_to_nothing_does_not_explode():
    rows = [{"step": step, "policy/entropy": 0.01 if step < FAULT else 0.2} for step in range(1, STEPS + 1)]
    assert run_warnings.entropy_explosion(rows) is None


def test_one_bad_held_out_figure_is_no_fall():
    held_out = {1: 0.3, 41: 0.4, 81: 0.2, 121: 0.4, 161: 0.2}
    rows = [row | {"reward/mean": 0.5} if row["step"] > 30 else row for row in healthy()]
    rows = [row | ({"eval/pass@1": held_out[row["step"]]} if row["step"] in held_out else {}) for row in rows]
    assert run_warnings.reward_hacking(rows) is None


def test_responses_that_are_cut_off_at_first_alone_are_no_fault():
    shares = [0.45] * 14 + [0.0] * 40  # before there is a mean of twenty to compare with
    rows = [{"step": step, "rollout/truncated_share": share} for step, share in enumerate(shares, start=1)]
    assert run_warnings.truncation(rows) is None


def test_errors_and_timeouts_of_the_verifier_add_up():
    both = {"verifier/error_share": 0.006, "verifier/timeout_share": 0.006}
    assert [found.title for found in warnings([row | both for row in healthy()])] == ["Verifier errors"]


@pytest.mark.parametrize(("spread", "is_clear"), [(0.0, True), (0.80, True), (0.81, False)])
def test_a_calibration_collapses_only_from_a_gap_that_was_clear(spread, is_clear):
    """A first median of 1 over values of 1 +- spread: three standard errors are 3 * 1.858 spread / sqrt(20)."""
    gaps = [1 + spread * (-1) ** step for step in range(20)] + [0.0] * 40
    rows = [{"step": step, "rollout/calibration_gap": gap} for step, gap in enumerate(gaps, start=1)]
    assert (run_warnings.calibration_collapse(rows) is not None) == is_clear


def test_responses_of_rare_perplexity_hide_no_collapse_of_calibration():
    gaps = [1.0] * 20 + [0.02] * 40
    for peak in (3, 11, 25, 33, 41, 49, 57):  # one in eight steps has one
        gaps[peak] = 160.0
    rows = [{"step": step, "rollout/calibration_gap": gap} for step, gap in enumerate(gaps, start=1)]
    found = run_warnings.calibration_collapse(rows)
    assert found is not None and found.step == 32 and "1.000 at first, 0.020 now" in found.found


def test_a_fault_that_has_passed_is_told_as_it_was():
    rows = [row | ({"policy/entropy": 0.02} if 80 <= row["step"] < 140 else {}) for row in healthy()]
    (found,) = warnings(rows)
    assert found.title == "Entropy collapse" and "and no more" in found.found
    assert float(found.found.split(" at first, ")[1].split()[0]) < 0.2 * 0.7  # and not the mean of today
    assert "now" in warnings(rows[:139])[0].found


def test_a_fault_that_comes_back_is_told_as_the_one_of_now():
    ends = {"Entropy collapse": {"policy/entropy": 0.02}, "Verifier errors": {"verifier/error_share": 0.05}}
    for title, fault in ends.items():
        rows = [row | (fault if 60 <= row["step"] < 100 or row["step"] >= 160 else {}) for row in healthy()]
        (first,), (found,) = warnings(rows[:150]), warnings(rows)
        assert first.title == found.title == title
        assert 60 <= first.step < 100 and "and no more" in first.found
        assert 160 <= found.step < 200 and found.found.endswith("now")


def test_rewards_below_zero_are_judged_by_the_same_rules():
    """DAPO's verifier: -1 and +1; the responses grow and are no better."""
    rows = [row | {"reward/mean": 2 * 0.12 - 1} for row in healthy()]
    longer = [row | ({"tokens/response_mean": 15.0} if row["step"] >= FAULT else {}) for row in rows]
    assert [found.title for found in warnings(longer)] == ["Longer, not better"]
    assert warnings([row | {"reward/mean": 2 * (0.12 + 0.002 * row["step"]) - 1} for row in rows]) == []


def test_what_switched_off_by_its_schedule_is_not_dead():
    rows = [row | {"cde/omega": 0.0, "cde/bonus": 0.0} if row["step"] > 50 else row for row in healthy()]
    assert warnings(rows) == []


def test_a_method_that_never_lived_and_a_verifier_that_always_failed_are_found_from_the_start():
    rows = [row | {"lp_reg/share": 0.0, "verifier/error_share": 0.08} for row in healthy()[:15]]
    assert [(found.step, found.title) for found in warnings(rows)] == [
        (1, "Verifier errors"),
        (1, "lp_reg does nothing"),
    ]


def test_short_runs_and_missing_metrics_raise_nothing():
    assert warnings([]) == warnings([{"step": 1}]) == warnings(healthy()[:5]) == []
    assert warnings([{"step": row["step"], "policy/entropy": None} for row in healthy()]) == []
