"""Figures of merit over verified responses: avg@n, unbiased pass@k and maj@n with intervals over problems, calibration.

figures([[Outcome(right=True, answer="42", text="...", tokens=812, truncated=False, log_prob=-310.2), ...], ...])
-> {"avg@32": Estimate(0.41, 0.25, 0.59), "pass@2": ..., "pass@32": ..., "maj@32": ..., "length": 903.5, ...}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, exp, isnan, nan, sqrt
from typing import NamedTuple

from megatron_rlvr.types import Rollout, RolloutGroup
from megatron_rlvr.verdict import is_right
from megatron_rlvr.verifiers.answer_forms import comparable

_Z = 1.959963984540054  # the normal distribution holds 95 % within so many standard deviations


@dataclass(frozen=True)
class Outcome:
    """One response, as the figures see it."""

    right: bool | None  # None where no verifier could judge it: it is left out, not counted as wrong
    answer: str | None  # what the verifier took for the answer; None casts no vote
    text: str
    tokens: int  # at least 1
    truncated: bool  # ended by the length limit
    log_prob: float  # nats, summed over its tokens


class Estimate(NamedTuple):
    """A mean over problems with its 95 % interval, were the problems drawn anew."""

    value: float
    low: float
    high: float


def figures(problems: Sequence[Sequence[Outcome]]) -> dict[str, Estimate | float]:
    """Every figure of a benchmark: the outcomes of each problem's n samples.

    avg@n, pass@k for k = 2, 4, ... and n, maj@n: Estimates. length: mean tokens; truncated, unjudged: shares of the
    responses; ppl_right, ppl_wrong: mean perplexity exp(-log_prob / tokens) of right and wrong responses, whose gap is
    CDE's calibration (arXiv 2509.09675, Fig. 9); distinct, distinct_right: different (right) responses per problem.
    Responses that no verifier could judge are left out. A problem that lost some of them stays in every figure, with
    fewer than k for pass@k where so few are left, for without it pass@n could be below avg@n; one that lost all is out.
    """
    samples = max(map(len, problems))
    judged = [[item for item in outcomes if item.right is not None] for outcomes in problems]
    right = [sum(item.right is True for item in outcomes) for outcomes in judged]
    pairs = list(zip(judged, right, strict=True))
    found: dict[str, Estimate | float] = {f"avg@{samples}": estimate([r / len(of) for of, r in pairs if of])}
    for k in _powers(samples):
        found[f"pass@{k}"] = estimate([pass_at_k(len(of), r, min(k, len(of))) for of, r in pairs if of])
    if samples > 1:
        found[f"maj@{samples}"] = estimate([majority(of) for of in judged if of])
    everything = [item for outcomes in problems for item in outcomes]
    found["length"] = mean([item.tokens for item in everything])
    found["truncated"] = mean([item.truncated for item in everything])
    found["unjudged"] = mean([item.right is None for item in everything])
    for name, kind in (("right", True), ("wrong", False)):
        found[f"ppl_{name}"] = mean([exp(-item.log_prob / item.tokens) for item in everything if item.right is kind])
    found["distinct"] = mean([len({item.text for item in of}) for of in problems])
    found["distinct_right"] = mean([len({item.text for item in of if item.right}) for of in judged])
    return found


def _powers(samples: int) -> list[int]:
    """2, 4, 8, ... below ``samples``, and ``samples`` where it is above 1."""
    below = [2**power for power in range(1, samples.bit_length()) if 2**power < samples]
    return [*below, samples] if samples > 1 else []


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that k of ``samples``, drawn without replacement, hold a right one (arXiv 2107.03374, Eq. 1)."""
    if k > samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, not {samples}")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def majority(outcomes: Sequence[Outcome]) -> float:
    """Chance that the most frequent answer is right, a tie broken by lot.

    All right answers are one answer, however they are written. Wrong ones are one where answer_forms.comparable makes
    one text of them, else those of a model that writes 2/3 in many ways would split their votes. Responses without an
    answer do not vote; where none votes the problem counts as wrong.
    """
    votes = Counter(
        "" if item.right else f"={comparable(item.answer or '')}" for item in outcomes if item.right or item.answer
    )
    if not votes:
        return 0.0
    most = max(votes.values())
    first = [answer for answer, count in votes.items() if count == most]
    return ("" in first) / len(first)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values in [0, 1], one per problem, with a score interval that stays in [0, 1].

    Wilson's interval (1927) for as many right-or-wrong problems as would make the mean as uncertain as it is: n times
    mean (1 - mean) over the variance of the values (effective sample size, Korn and Graubard 1998), at least n. With
    one sample a problem that is Wilson's own. Values that do not differ say nothing of the variance: n again.
    """
    if not values:
        return Estimate(nan, nan, nan)
    average = mean(values)
    widest = average * (1 - average)
    variance = sum((value - average) ** 2 for value in values) / max(1, len(values) - 1)
    size = len(values) * (max(1.0, widest / variance) if variance > 1e-12 else 1.0)
    centre = (average + _Z**2 / (2 * size)) / (1 + _Z**2 / size)
    half = _Z * sqrt(widest / size + _Z**2 / (4 * size**2)) / (1 + _Z**2 / size)
    # Within [0, 1], and around the mean, which rounding may miss where every value is 0 or 1.
    return Estimate(average, min(average, max(0.0, centre - half)), max(average, min(1.0, centre + half)))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else nan


def summarise(groups: list[RolloutGroup]) -> dict[str, float]:
    """The figures of held-out prompts as plain numbers, with pass@1 for avg@n, and pass@k for k = n alone.

    The interval of pass@k is pass_low@k .. pass_high@k. What there is nothing of (ppl_right where no
    response is right) is left out.
    """
    found = figures([[outcome(rollout) for rollout in group.rollouts] for group in groups])
    most = max(len(group.rollouts) for group in groups)
    passes = {"pass@1": found.pop(f"avg@{most}")} | {name: found[name] for name in (f"pass@{most}",) if name in found}
    metrics: dict[str, float] = {}
    for name, figure in (passes | {name: found[name] for name in found if not name.startswith("pass@")}).items():
        if isinstance(figure, Estimate):
            kind, _, k = name.partition("@")
            metrics |= {f"{kind}_low@{k}": figure.low, f"{kind}_high@{k}": figure.high}
            figure = figure.value
        metrics[name] = figure
    return {name: value for name, value in metrics.items() if not isnan(value)}


def outcome(rollout: Rollout) -> Outcome:
    """What the figures see of a response; one without a verdict was not judged."""
    verdict = rollout.verdict
    right = is_right(verdict) if verdict else None
    return Outcome(
        right=right,
        answer=verdict.extracted if verdict and right is not None else None,
        text=rollout.text,
        tokens=len(rollout.response_ids),
        truncated=rollout.finish_reason == "length",
        log_prob=sum(rollout.rollout_log_probs),
    )
