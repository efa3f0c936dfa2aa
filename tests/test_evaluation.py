"""Held-out figures against enumeration, and what is left out of them."""

from __future__ import annotations

from itertools import combinations

import pytest

from megatron_rlvr.evaluation import pass_at_k, summarise
from megatron_rlvr.types import Prompt, Rollout, RolloutGroup
from megatron_rlvr.verdict import Verdict


def group(*rewards: float | None) -> RolloutGroup:
    """A prompt with one response per reward; None is a verifier's failure. Responses of equal reward are alike."""
    rollouts = [
        Rollout(index, [1] * (index + 1), [0.0] * (index + 1), "stop", 0, text=str(reward))
        for index, reward in enumerate(rewards)
    ]
    for rollout, reward in zip(rollouts, rewards, strict=True):
        rollout.verdict = Verdict(0.0, "timeout") if reward is None else Verdict(reward, "ok")
    return RolloutGroup(Prompt("p/1", "", (1,), "countdown", None), rollouts)


@pytest.mark.parametrize(("samples", "right", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 4), (6, 6, 2), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(samples: int, right: int, k: int) -> None:
    draws = list(combinations(range(samples), k))
    hits = sum(any(index < right for index in draw) for draw in draws)
    assert pass_at_k(samples, right, k) == pytest.approx(hits / len(draws), abs=1e-12)


def test_pass_at_k_wants_enough_samples() -> None:
    with pytest.raises(ValueError, match="at least 4 samples"):
        pass_at_k(3, 1, 4)


def test_summary() -> None:
    figures = summarise([group(1.0, 0.0), group(0.0, 0.0), group(1.0, 1.0)])
    assert figures == {
        "eval/pass@1": 0.5,
        "eval/pass@2": pytest.approx(2 / 3),
        "eval/distinct": 4 / 3,
        "eval/distinct_right": 2 / 3,
        "eval/length": 1.5,
    }


def test_a_failed_verifier_is_no_wrong_answer() -> None:
    figures = summarise([group(1.0, None), group(0.0, 1.0)])
    assert figures["eval/pass@1"] == 0.75  # 1 of 1 judged, 1 of 2
    assert figures["eval/pass@2"] == 1.0  # of the second prompt alone
