"""Sampling until enough groups are kept: what is asked for, what is dropped, and when it ends."""

from __future__ import annotations

import random

import pytest

from megatron_rlvr.exploration.base import build
from megatron_rlvr.rollout.enough import MOST_GENERATIONS, Sampled, sample
from megatron_rlvr.types import Prompt, Rollout, RolloutGroup
from megatron_rlvr.verdict import Verdict
from megatron_rlvr.verifiers import VerifierError

METHOD = build({"dynamic_sampling": {}})
ALWAYS = build({})


def group(number: int, mixed: bool, late: bool = False) -> RolloutGroup:
    """Eight responses, half of them or all of them right; where ``late``, the last one's verifier ran out of time."""
    verdicts = [Verdict(float(place % 2 == 0 or not mixed), "ok") for place in range(8)]
    if late:
        verdicts[-1] = Verdict(0.0, "timeout")
    rollouts = [Rollout(place, [5], [-0.5], "stop", 0, "", verdict) for place, verdict in enumerate(verdicts)]
    return RolloutGroup(Prompt(str(number), "", (1,), "toy", None), rollouts)


class Prompts:
    """Deals groups of which a share is mixed; remembers how many were asked for."""

    def __init__(self, share: float, seed: int = 0) -> None:
        self.share, self.random = share, random.Random(seed)
        self.asked: list[int] = []

    def collect(self, count: int, generation: int) -> list[RolloutGroup]:
        assert generation == len(self.asked)
        first = sum(self.asked)
        self.asked.append(count)
        return [group(first + place, self.random.random() < self.share) for place in range(count)]


def names(groups: list[RolloutGroup]) -> list[int]:
    return [int(group.prompt.id) for group in groups]


def test_a_method_that_keeps_everything_samples_once():
    prompts = Prompts(0.5)
    found = sample(256, prompts.collect, ALWAYS.keep_group, 0.1)
    assert prompts.asked == [256] and names(found.kept) == list(range(256))
    assert found.metrics()["rollout/kept_share"] == found.metrics()["rollout/generations"] == 1.0


@pytest.mark.parametrize("share", [0.95, 0.6, 0.3, 0.15])
def test_enough_groups_come_whatever_share_is_kept(share: float):
    """In each of 20 steps. At 0.15 a failure is fewer than 256 of 2560 draws: seven deviations below the mean."""
    for seed in range(20):
        prompts = Prompts(share, seed)
        found = sample(256, prompts.collect, METHOD.keep_group, 0.2)
        assert len(found.kept) == 256 and names(found.kept) == sorted(names(found.kept))
        assert names(found.groups) == list(range(sum(prompts.asked)))
        assert prompts.asked[0] == 256 and max(prompts.asked) == 256
        assert len(prompts.asked) <= 1 / share + 3


def test_a_late_generation_asks_for_what_is_missing():
    prompts = Prompts(0.95)
    found = sample(256, prompts.collect, METHOD.keep_group, 0.2)
    assert len(prompts.asked) == 2 and prompts.asked[1] < 64
    assert len(found.groups) > len(found.kept) == 256  # the surplus of the second generation is dropped
    mixed = sum(METHOD.keep_group(group) for group in found.groups)  # and was not turned away
    assert mixed > 256 and found.metrics()["rollout/kept_share"] == pytest.approx(mixed / len(found.groups))


def test_too_few_end_the_run_with_a_word_on_why():
    prompts = Prompts(0.0)
    with pytest.raises(RuntimeError, match="10 generations only 0 of 4 groups were kept, out of 40: .*all are solved"):
        sample(4, prompts.collect, METHOD.keep_group, 0.2)
    assert prompts.asked == [4] * MOST_GENERATIONS


@pytest.mark.parametrize(
    ("late", "failed"),
    [
        ((0, 3), ""),  # 3 of the second generation's 24 are more than a tenth, 3 of the step's 56 are not
        ((3, 3), "6 of 56"),  # 3 of the first one's 32 are not, 6 of the step's 56 are
        ((4, 0), "4 of 32"),  # more than a tenth so far, whatever would come
    ],
)
def test_the_share_of_failed_verdicts_is_the_whole_steps(late: tuple[int, int], failed: str):
    """Three of the first four groups are kept; three more are then asked for, all of which would be."""

    def collect(count: int, generation: int) -> list[RolloutGroup]:
        assert count == (4, 3)[generation]
        return [group(place, generation == 1 or place > 0, place < late[generation]) for place in range(count)]

    if failed:
        with pytest.raises(VerifierError, match=f"^{failed} responses .*reward.max_error_share=0.1"):
            sample(4, collect, METHOD.keep_group, 0.1)
    else:
        assert len(sample(4, collect, METHOD.keep_group, 0.1).groups) == 7


def test_figures_are_of_everything_sampled():
    """Of four groups two are all right; of the kept ones alone the mean reward would be 1/2."""
    found = Sampled([group(0, True), group(1, False), group(2, True), group(3, False)], turned_away=2, generations=2)
    found.kept = [found.groups[0], found.groups[2]]
    figures = found.metrics()
    assert figures["rollout/kept_share"] == 0.5 and figures["rollout/generations"] == 2
    assert figures["reward/mean"] == pytest.approx((4 + 8 + 4 + 8) / 32)
