"""Held-out figures against hand-computed cases and enumeration, and what is left out of them."""

from __future__ import annotations

import math
from itertools import combinations, pairwise, permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.evaluation import Estimate, Outcome, estimate, figures, majority, pass_at_k, summarise
from megatron_rlvr.types import Prompt, Rollout, RolloutGroup
from megatron_rlvr.verdict import Verdict
from megatron_rlvr.verifiers.answer_forms import comparable


def group(*rewards: float | None) -> RolloutGroup:
    """A prompt with one response per reward; None is a verifier's failure. Responses of equal reward are alike."""
    rollouts = [
        Rollout(index, [1] * (index + 1), [0.0] * (index + 1), "stop", 0, text=str(reward))
        for index, reward in enumerate(rewards)
    ]
    for rollout, reward in zip(rollouts, rewards, strict=True):
        rollout.verdict = Verdict(0.0, "timeout") if reward is None else Verdict(reward, "ok", extracted=f"{reward}")
    return RolloutGroup(Prompt("p/1", "", (1,), "countdown", None), rollouts)


def answered(answer: str | None, right: bool | None = False) -> Outcome:
    return Outcome(right, answer, text=f"{answer}", tokens=2, truncated=False, log_prob=-1.0)


def problem(*right: bool) -> list[Outcome]:
    return [answered("r" if good else "w", good) for good in right]


@pytest.mark.parametrize(("samples", "right", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 4), (6, 6, 2), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(samples: int, right: int, k: int) -> None:
    draws = list(combinations(range(samples), k))
    hits = sum(any(index < right for index in draw) for draw in draws)
    assert pass_at_k(samples, right, k) == pytest.approx(hits / len(draws), abs=1e-12)


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs hold it
    assert pass_at_k(32, 1, 32) == 1.0 and pass_at_k(32, 0, 32) == 0.0
    assert pass_at_k(10, 3, 5) == pytest.approx(1 - 21 / 252)


def test_pass_at_k_wants_enough_samples() -> None:
    with pytest.raises(ValueError, match="at least 4 samples"):
        pass_at_k(3, 1, 4)


@pytest.mark.parametrize(
    ("right", "problems", "low", "high"),
    [(8, 10, 0.4901625, 0.9433178), (0, 30, 0.0, 0.1135134), (30, 30, 0.8864866, 1.0), (1, 2, 0.0945312, 0.9054688)],
)
def test_the_interval_of_yes_and_no_is_wilsons(right: int, problems: int, low: float, high: float) -> None:
    """By hand from (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    found = estimate([1.0] * right + [0.0] * (problems - right))
    assert found == pytest.approx((right / problems, low, high), abs=1e-6)


def test_the_interval_of_shares_solves_its_equation() -> None:
    """The bounds are the p for which |mean - p| is z standard errors, the variance scaled like p (1 - p): by search."""
    values = [0.0, 0.25, 0.25, 0.5, 0.75, 0.9, 1.0, 0.1]
    found = estimate(values)
    average = sum(values) / 8
    inflation = sum((value - average) ** 2 for value in values) / 7 / (average * (1 - average))

    def excess(p: float) -> float:
        return abs(average - p) - 1.959963984540054 * math.sqrt(inflation * p * (1 - p) / 8)

    grid = [index / 1_000_000 for index in range(1, 1_000_000)]
    inside = [p for p in grid if excess(p) <= 0]
    assert found == pytest.approx((average, inside[0], inside[-1]), abs=2e-6)
    narrow = estimate([0.4, 0.5, 0.6, 0.5] * 4)
    assert 0 < narrow.high - narrow.low < 0.08  # problems that hardly differ say more than Wilson's 0.44


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Every outcome of 7 problems with 2 samples each, weighed by its probability: 93 % or more, aiming at 95."""
    for chances in ([0.5] * 7, [0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.5], [0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9]):
        truth, covered = sum(chances) / 7, 0.0
        for shares in product((0.0, 0.5, 1.0), repeat=7):
            weights = [
                {0.0: (1 - p) ** 2, 0.5: 2 * p * (1 - p), 1.0: p * p}[s] for p, s in zip(chances, shares, strict=True)
            ]
            found = estimate(shares)
            covered += math.prod(weights) * (found.low <= truth <= found.high)
        assert covered > 0.93, chances


def test_the_intervals_ends() -> None:
    assert all(math.isnan(figure) for figure in estimate([]))
    alone = estimate([0.5])
    assert alone.value == 0.5 and alone.high - alone.low > 0.8  # one problem says next to nothing of others
    for values in ([0.3] * 10, [1.0] * 3, [0.0]):
        found = estimate(values)
        assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(
    ("outcomes", "chance"),
    [
        ([answered("7", True), answered("8"), answered("7.0", True)], 1.0),  # right answers are one answer
        ([answered("7", True), answered("8"), answered("8")], 0.0),
        ([answered("7", True), answered("8")], 0.5),
        ([answered("7", True), answered("8"), answered("9")], 1 / 3),
        ([answered("7", True), answered(None), answered(None)], 1.0),  # no answer, no vote
        ([answered(None), answered(None)], 0.0),
    ],
)
def test_majority(outcomes: list[Outcome], chance: float) -> None:
    assert majority(outcomes) == pytest.approx(chance)
    firsts = []
    for order in permutations(outcomes):  # brute force: the first to reach the most votes, over every order
        votes = [None if item.answer is None else "right" if item.right else item.answer for item in order]
        cast = [vote for vote in votes if vote is not None]
        firsts.append(bool(cast) and max(cast, key=cast.count) == "right")
    assert sum(firsts) / len(firsts) == pytest.approx(chance)


def test_a_wrong_answer_is_one_answer_however_it_is_written() -> None:
    right = [answered(text, True) for text in ("1/2", "0.5")]
    for wrong in (
        ("2/3", r"\dfrac{2}{3}", r"\frac 23"),
        ("1000", "1,000", "1000.0", "1{,}000"),
        ("(1, 2)", r"\left(1,2\right)", "(1,2)"),
        (r"x \le 2", r"x\leq2", "x≤2."),
    ):
        assert majority([*right, *map(answered, wrong)]) == 0.0, wrong
    assert majority([*right, answered("2/3"), answered("3/2"), answered("12 3"), answered("1 23")]) == 1.0
    programs = ["x = 1" * 300, "x  = 1" * 300]  # too long for an answer: they are compared as they are
    assert majority([answered("1", True), *map(answered, programs)]) == pytest.approx(1 / 3)


def test_figures_by_hand() -> None:
    found = figures(
        [problem(True, False, False, False), problem(False, False, False, False), problem(True, *[True] * 3)]
    )
    assert list(found)[:4] == ["avg@4", "pass@2", "pass@4", "maj@4"]
    assert found["avg@4"] == estimate([0.25, 0.0, 1.0]) and found["avg@4"].value == pytest.approx(5 / 12)
    assert found["pass@2"].value == pytest.approx((0.5 + 0 + 1) / 3)
    assert found["pass@4"] == estimate([1.0, 0.0, 1.0])
    assert found["maj@4"].value == pytest.approx(1 / 3)
    three = figures([problem(*[True] * 6)])
    assert [name for name in three if name.startswith("pass@")] == ["pass@2", "pass@4", "pass@6"]
    assert not any(name.startswith(("pass@", "maj@")) for name in figures([problem(True)]))


def test_perplexity_tells_confident_mistakes() -> None:
    sure = Outcome(True, "1", "a", tokens=4, truncated=False, log_prob=4 * math.log(0.5))
    unsure = Outcome(False, "2", "b", tokens=2, truncated=True, log_prob=2 * math.log(0.125))
    lost = Outcome(None, None, "c", tokens=6, truncated=False, log_prob=-1.0)
    found = figures([[sure, unsure, lost]])
    assert found["ppl_right"] == pytest.approx(2) and found["ppl_wrong"] == pytest.approx(8)
    assert (found["length"], found["truncated"], found["unjudged"]) == (4, 1 / 3, 1 / 3)
    assert (found["distinct"], found["distinct_right"]) == (3, 1)  # whether it was judged or not
    assert math.isnan(figures([[sure]])["ppl_wrong"])


@pytest.mark.parametrize(("reward", "right"), [(-1.0, 0), (0.1, 0), (0.5, 0), (0.6, 1), (1.0, 1)])
def test_a_reward_above_one_half_is_a_right_answer(reward: float, right: int) -> None:
    assert summarise([group(reward)])["pass@1"] == right


def test_right_is_what_the_verdict_says_whatever_the_reward() -> None:
    held_out = group(1.0, 1.0, 0.5, 0.5)
    for rollout, right in zip(held_out.rollouts, (False, False, True, False), strict=True):
        rollout.verdict = Verdict(rollout.verdict.reward, "ok", right=right)
    metrics = summarise([held_out])
    assert (metrics["pass@1"], metrics["pass@4"], metrics["distinct_right"]) == (0.25, 1.0, 1.0)


def test_summary() -> None:
    metrics = summarise([group(1.0, 0.0), group(0.0, 0.0), group(1.0, 1.0)])
    expected = {
        "pass@1": 0.5,
        "pass@2": pytest.approx(2 / 3),
        "maj@2": pytest.approx(0.5),
        "distinct": 4 / 3,
        "distinct_right": 2 / 3,
        "length": 1.5,
        "truncated": 0,
        "unjudged": 0,
        "ppl_right": 1,
        "ppl_wrong": 1,
    }
    assert {name: metrics[name] for name in expected} == expected
    low, high = metrics["pass_low@1"], metrics["pass_high@1"]
    assert Estimate(0.5, low, high) == estimate([0.5, 0.0, 1.0])
    assert set(metrics) - set(expected) == {
        f"{kind}_{end}@{k}" for kind, k in (("pass", 1), ("pass", 2), ("maj", 2)) for end in ("low", "high")
    }
    assert "ppl_right" not in summarise([group(0.0)])


def test_a_failed_verifier_is_no_wrong_answer() -> None:
    metrics = summarise([group(1.0, None), group(0.0, 1.0)])
    assert metrics["pass@1"] == 0.75  # 1 of 1 judged, 1 of 2
    assert metrics["pass@2"] == metrics["pass@1"] + 0.25  # the first prompt's only judged one is right
    assert metrics["unjudged"] == 0.25
    assert summarise([group(0.0, None), group(0.0, 1.0)])["pass@2"] == 0.5
    lost_one = summarise([group(None, None), group(1.0, 1.0)])
    assert lost_one["pass@2"] == lost_one["maj@2"] == 1.0  # nothing known of the first


@given(st.lists(st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=9), min_size=1, max_size=4))
def test_more_tries_are_never_worse_whatever_was_lost(rights: list[list[bool | None]]) -> None:
    found = figures([[answered("7", right) for right in of] for of in rights])
    chances = [found[name].value for name in found if name.startswith(("avg@", "pass@"))]
    if any(right is not None for of in rights for right in of):
        assert all(less <= more + 1e-12 for less, more in pairwise(chances)), found
    else:
        assert all(map(math.isnan, chances))


def test_wrong_answers_are_one_where_name_unit_or_order_differ() -> None:
    """As the verifier takes right ones: else a vote for wrong ones would be split, and maj too high."""
    for same in (
        (r"\$17", "17", "x = 17", r"17\text{ cm}", "17.0"),
        ("1, 2", "2,1"),
        ("90", r"90^\circ", "90 degrees"),
    ):
        assert len({comparable(text) for text in same}) == 1, same
    for other in (("17", "18"), ("50", r"50\%"), ("(1,2)", "(2,1)"), ("x=1, y=2", "1"), ("x+1=17", "17")):
        assert len({comparable(text) for text in other}) == 2, other
