"""Figures of merit over verified rollout groups: pass@1, unbiased pass@k, distinct right answers."""

from __future__ import annotations

from math import comb

from megatron_rlvr.types import RolloutGroup
from megatron_rlvr.verifiers import is_scored


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that k of ``samples``, drawn without replacement, hold a right one (arXiv 2107.03374, Eq. 1)."""
    if k > samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, not {samples}")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def summarise(groups: list[RolloutGroup]) -> dict[str, float]:
    """eval/pass@1, eval/pass@K for K samples a prompt, eval/length, eval/distinct: different responses per prompt.

    eval/distinct_right counts the right ones of them, where a problem has more than one solution. A response counts as
    right when its reward is above one half. Responses that no verifier could judge are left out; a prompt with fewer
    than K judged responses counts for pass@1 alone.
    """
    most = max(len(group.rollouts) for group in groups)
    first, best, distinct_right = [], [], []
    for group in groups:
        judged = [item for item in group.rollouts if item.verdict is not None and is_scored(item.verdict)]
        answers = [item.text for item in judged if item.verdict.reward > 0.5]
        right = len(answers)
        distinct_right.append(len(set(answers)))
        if judged:
            first.append(right / len(judged))
        if len(judged) == most:
            best.append(pass_at_k(most, right, most))
    distinct = [len({item.text for item in group.rollouts}) for group in groups]
    lengths = [len(item.response_ids) for group in groups for item in group.rollouts]
    figures = {
        "eval/pass@1": _mean(first),
        "eval/distinct": _mean(distinct),
        "eval/distinct_right": _mean(distinct_right),
        "eval/length": _mean(lengths),
    }
    if most > 1:
        figures[f"eval/pass@{most}"] = _mean(best)
    return figures


def _mean(values: list) -> float:
    return sum(values) / len(values) if values else float("nan")
