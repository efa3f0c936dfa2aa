"""What a step's responses come to: means over those that were judged, and how surprised the policy was by them."""

from __future__ import annotations

import math

import pytest

from megatron_rlvr.rollout_metrics import perplexity, rollout_metrics
from megatron_rlvr.types import Prompt, Rollout, RolloutGroup
from megatron_rlvr.verdict import Verdict


def rollout(log_probs: list[float], reward: float, status: str = "ok", finish: str = "stop") -> Rollout:
    return Rollout(0, [1] * len(log_probs), log_probs, finish, 0, "", Verdict(reward, status))


def group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(Prompt("p", "", (1,), "toy", None), list(rollouts))


def test_perplexity_is_of_the_mean_log_prob():
    assert perplexity(rollout([-1.0, -2.0, -3.0], 1.0)) == pytest.approx(math.exp(2.0))
    assert perplexity(rollout([], 1.0)) == 1.0


def test_means_are_over_judged_responses_and_calibration_tells_right_from_wrong():
    right, wrong = rollout([-0.5] * 4, 1.0), rollout([-1.5, -2.5], 0.0, "unparseable", "length")
    failed = rollout([-9.0], 0.0, "timeout")
    figures = rollout_metrics([group(right, wrong), group(failed, right)])
    assert figures["reward/mean"] == pytest.approx(2 / 3)
    assert figures["reward/std"] == pytest.approx(math.sqrt(2 / 9))
    assert figures["reward/right_share"] == 0.5  # of all four, judged or not
    assert figures["tokens/response_mean"] == pytest.approx(11 / 4) and figures["tokens/response_max"] == 4
    assert figures["rollout/truncated_share"] == 0.25
    assert figures["verifier/ok_share"] == 0.5
    assert figures["verifier/timeout_share"] == figures["verifier/unparseable_share"] == 0.25
    assert figures["rollout/perplexity_right"] == pytest.approx(math.exp(0.5))
    assert figures["rollout/perplexity_wrong"] == pytest.approx(math.exp(2.0))
    assert figures["rollout/calibration_gap"] == pytest.approx(math.exp(2.0) - math.exp(0.5))


def test_right_is_what_the_verdict_says_whatever_the_reward():
    formatted, unformatted = rollout([-2.0], 1.0), rollout([-1.0], 0.5)  # by 1.0*math + 1.0*format, 0.5*math + ...
    formatted.verdict, unformatted.verdict = Verdict(1.0, "ok", right=False), Verdict(0.5, "ok", right=True)
    another = rollout([-4.0, -2.0], 1.0)
    another.verdict = formatted.verdict
    figures = rollout_metrics([group(formatted, unformatted, unformatted, another)])
    assert figures["reward/right_share"] == 0.5
    assert figures["rollout/perplexity_right"] == pytest.approx(math.exp(1.0))
    assert figures["rollout/perplexity_wrong"] == pytest.approx((math.exp(2.0) + math.exp(3.0)) / 2)


def test_prompts_whose_judged_responses_are_all_right_or_all_wrong():
    right, wrong, failed = rollout([-1.0], 1.0), rollout([-1.0], 0.0), rollout([-1.0], 0.0, "timeout")
    figures = rollout_metrics(
        [group(right, right), group(right, failed), group(wrong, wrong), group(right, wrong), group(failed, failed)]
    )
    assert figures["reward/always_right_share"] == 0.5 and figures["reward/never_right_share"] == 0.25


def test_what_there_is_nothing_of_is_left_out():
    figures = rollout_metrics([group(rollout([-1.0], 1.0))])
    assert "rollout/perplexity_wrong" not in figures and "rollout/calibration_gap" not in figures
    failed = rollout_metrics([group(rollout([-1.0], 0.0, "error"))])
    assert math.isnan(failed["reward/mean"]) and "reward/never_right_share" not in failed
