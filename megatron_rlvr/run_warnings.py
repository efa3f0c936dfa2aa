"""What a careful person would say about a run: what began at which step, by which figures, and why it matters.

Each check is one function over the rows of metrics.jsonl. It compares the mean of the last WINDOW steps with that of
the first ones, and speaks only where a fault has lasted SUSTAINED steps, so that one bad batch raises nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_rlvr.pages.charts import is_number

WINDOW = 20  # steps of a mean, of the first ones and of the last ones up to a step
SUSTAINED = 10  # steps that a fault must last
# Of n normal values: the median's standard error is sqrt(pi / 2) sigma / sqrt(n), sigma 1.4826 median deviations.
MEDIAN_ERROR = 1.4826 * np.sqrt(np.pi / 2)
# Metrics that say how much a method does; at 0 it does nothing. CDE's bonus may be switched off by its own schedule.
ACTIVITY = {
    "lp_reg/share": "",
    "kl_cov/moved": "",
    "clip_cov/share": "",
    "high_entropy/left_out": "",
    "stapo/left_out": "",
    "sim_hash/bonus": "",
    "cde/bonus": "cde/omega",
    "cde/critic_bonus": "cde/critic_omega",
}


@dataclass(frozen=True)
class RunWarning:
    """RunWarning(120, "Entropy collapse", "0.61 nats at first, 0.04 now", "samples become alike, ...")."""

    step: int  # where it began
    title: str
    found: str
    why: str


@dataclass(frozen=True)
class Trend:
    """A metric at the steps that have it: its mean over the first WINDOW of them, and over the last ones up to each."""

    steps: np.ndarray  # [n]
    values: np.ndarray  # [n]
    first: float
    recent: np.ndarray  # [n]; the mean of fewer values at the start


def trend(rows: Sequence[dict], *metrics: str) -> Trend:
    """The sum of the metrics, at the steps that have a number for all of them."""
    held = [row for row in rows if all(is_number(row.get(metric)) for metric in metrics)]
    steps = np.array([row["step"] for row in held], dtype=int)
    values = np.array([sum(row[metric] for metric in metrics) for row in held], dtype=float)
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - WINDOW)
    recent = (total[ends] - total[starts]) / (ends - starts)
    return Trend(steps, values, float(values[:WINDOW].mean()) if len(values) else float("nan"), recent)


def stretches(fault: np.ndarray) -> list[tuple[int, int]]:
    """(first, last) place of each SUSTAINED or more in a row that have the fault, the first WINDOW places aside."""
    bad = np.concatenate([[False], fault & (np.arange(len(fault)) >= WINDOW), [False]]).astype(int)
    edges = np.diff(bad)
    runs = zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1, strict=True)
    return [(int(first), int(last)) for first, last in runs if last - first + 1 >= SUSTAINED]


def entropy_collapse(rows: Sequence[dict]) -> RunWarning | None:
    """The policy's entropy is below a fifth of what it was."""
    entropy = trend(rows, "policy/entropy")
    return _warn(
        entropy,
        entropy.recent < 0.2 * entropy.first,
        "Entropy collapse",
        "{first:.3f} nats per token at first, {last:.3f} {when}",
        "Samples of a prompt become alike, so that advantages vanish and nothing new is tried. Lp-Reg, a higher "
        "clip_high or an entropy bonus hold it up.",
    )


def entropy_explosion(rows: Sequence[dict]) -> RunWarning | None:
    """The policy's entropy is three times what it was, and half a nat more."""
    entropy = trend(rows, "policy/entropy")
    return _warn(
        entropy,
        (entropy.recent > 3 * entropy.first) & (entropy.recent > entropy.first + 0.5),
        "Entropy explosion",
        "{first:.3f} nats per token at first, {last:.3f} {when}",
        "The policy drifts towards noise: lower an entropy bonus, or the share of tokens that are protected from "
        "learning.",
    )


def calibration_collapse(rows: Sequence[dict]) -> RunWarning | None:
    """Wrong answers used to surprise the policy more than right ones, and no longer do.

    By medians, and their standard error from the median deviation: one response can have a perplexity of hundreds.
    """
    gap = trend(rows, "rollout/calibration_gap")
    start = gap.values[:WINDOW]
    if len(start) < WINDOW:
        return None
    first = float(np.median(start))
    clear = first > 3 * MEDIAN_ERROR * np.median(np.abs(start - first)) / np.sqrt(WINDOW)
    ends = range(1, len(gap.values) + 1)
    recent = np.array([np.median(gap.values[max(0, end - WINDOW) : end]) for end in ends])
    gap = replace(gap, first=first, recent=recent)
    return _warn(
        gap,
        (gap.recent < 0.1 * gap.first) & clear,
        "Calibration collapse",
        "perplexity of wrong answers less that of right ones: {first:.3f} at first, {last:.3f} {when}",
        "The policy is as sure of its errors as of its successes. CDE's perplexity bonus is made against this.",
    )


def length_without_reward(rows: Sequence[dict]) -> RunWarning | None:
    """Responses are half as long again, and no better."""
    both = [row for row in rows if is_number(row.get("reward/mean"))]
    length, reward = trend(both, "tokens/response_mean"), trend(both, "reward/mean")
    if len(length.steps) != len(reward.steps):
        return None
    return _warn(
        length,
        (length.recent > 1.5 * length.first) & (reward.recent < reward.first + 0.1 * abs(reward.first) + 0.01),
        "Longer, not better",
        "{first:.0f} tokens per response at first, {last:.0f} {when}, at the same reward",
        "Length is being rewarded by itself, by the loss's reduction or by the verifier. reduction: sequence_sum "
        "weighs tokens alike, exploration.overlong makes length cost.",
    )


def format_hacking(rows: Sequence[dict]) -> RunWarning | None:
    """The reward rose because more answers can be read, not because more of those are right."""
    held = [row for row in rows if is_number(row.get("reward/right_share")) and row.get("verifier/ok_share")]
    held = [
        row | {"of_readable": row["reward/right_share"] / row["verifier/ok_share"]}
        for row in held
        if is_number(row.get("reward/mean"))
    ]
    reward, right, readable = (trend(held, name) for name in ("reward/mean", "reward/right_share", "of_readable"))
    gain = right.recent - right.first
    return _warn(
        reward,
        (reward.recent - reward.first > 0.1) & (readable.recent - readable.first < 0.2 * gain.clip(0.0)),
        "Reward for the format alone",
        "reward {first:.3f} at first, {last:.3f} {when}, and the same share of the readable answers is right",
        "What was learned is how to be parsed. Compare the held-out figures before trusting the curve.",
    )


def reward_hacking(rows: Sequence[dict]) -> RunWarning | None:
    """The training reward rises while the held-out one falls."""
    held = [row for row in rows if is_number(row.get("eval/pass@1"))]
    reward = trend(rows, "reward/mean")
    if len(held) < 3 or not len(reward.steps):
        return None
    for place in range(1, len(held) - 1):
        now = held[place + 1]["eval/pass@1"]
        gained = np.interp(held[place + 1]["step"], reward.steps, reward.recent) - reward.first
        if gained > 0.1 and max(now, held[place]["eval/pass@1"]) < held[0]["eval/pass@1"] - 0.02:
            seen = f"reward up by {gained:.3f}, held-out pass@1 from {held[0]['eval/pass@1']:.1%} to {now:.1%}"
            why = "The policy found what the verifier pays for that is not the task, or learned the prompts by heart."
            return RunWarning(held[place]["step"], "Reward rises, held-out figures fall", seen, why)
    return None


def truncation(rows: Sequence[dict]) -> RunWarning | None:
    """Half of the responses meet the length limit, or a third, more than at first."""
    share = trend(rows, "rollout/truncated_share")
    return _warn(
        share,
        (share.recent > 0.5) | ((share.recent > 0.3) & (share.recent > share.first + 0.1) & (share.steps > WINDOW)),
        "Responses are cut off",
        "{first:.1%} met the length limit at first, {last:.1%} {when}",
        "A cut answer is judged wrong whatever it was about to say: raise rollout.max_response_length, or use "
        "exploration.overlong.",
        from_start=True,
    )


def log_prob_gap(rows: Sequence[dict]) -> RunWarning | None:
    """The engine's log-probs and the policy's are far apart, or move apart."""
    gap = trend(rows, "rollout/log_prob_gap_mean")
    return _warn(
        gap,
        (gap.recent > 0.1) | ((gap.recent > 3 * gap.first) & (gap.recent > 0.005)),
        "Log-prob gap",
        "{first:.1e} nats per token between policy and engine at first, {last:.1e} {when}",
        "The samples come from another policy than the one that learns from them. "
        "exploration.rollout_correction weighs them; fp32 or the same kernels close the gap.",
        from_start=True,
    )


def verifier_errors(rows: Sequence[dict]) -> RunWarning | None:
    """More than one verdict in a hundred is an error or a timeout."""
    failed = trend(rows, "verifier/error_share", "verifier/timeout_share")
    return _warn(
        failed,
        failed.recent > 0.01,
        "Verifier errors",
        "{last:.1%} of the responses without a verdict {when}",
        "They train nothing, and are seldom a fair sample: hard problems time out first. rollouts.jsonl has them with "
        "their status.",
        from_start=True,
    )


def dead_method(rows: Sequence[dict]) -> RunWarning | None:
    """An exploration method is on and does nothing."""
    for metric, weight in ACTIVITY.items():
        held = [row for row in rows if not weight or row.get(weight)]
        done = trend(held, metric)
        warning = _warn(
            done,
            done.recent.round(9) == 0,
            f"{metric.partition('/')[0]} does nothing",
            f"{metric} " + "{first:.2g} at first, {last:.2g} {when}",
            "The run is its baseline from here on: look at the method's threshold and share.",
            from_start=True,
        )
        if warning:
            return warning
    return None


def no_signal(rows: Sequence[dict]) -> RunWarning | None:
    """All responses of every step earn the same."""
    spread = trend(rows, "reward/std")
    return _warn(
        spread,
        spread.recent < 1e-6,
        "Nothing to learn from",
        "a standard deviation of {last:.1g} over a step's rewards {when}",
        "With equal rewards every advantage is 0: the prompts are all too hard or all too easy for this policy.",
        from_start=True,
    )


CHECKS: list[Callable[[Sequence[dict]], RunWarning | None]] = [
    entropy_collapse,
    entropy_explosion,
    calibration_collapse,
    length_without_reward,
    format_hacking,
    reward_hacking,
    truncation,
    log_prob_gap,
    verifier_errors,
    dead_method,
    no_signal,
]


def warnings(rows: Sequence[dict]) -> list[RunWarning]:
    """Every warning that the rows of metrics.jsonl raise, in the order in which they began."""
    found = [warning for check in CHECKS if (warning := check(rows))]
    return sorted(found, key=lambda warning: warning.step)


def _warn(
    of: Trend, fault: np.ndarray, title: str, found: str, why: str, from_start: bool = False
) -> RunWarning | None:
    """The warning where the fault has lasted; one that needs no comparison may have been there from the start.

    It is of the last time: a fault that came back is there. {last} is the mean at the fault's end and {when} that step,
    or "now".
    """
    before = WINDOW if from_start else 0  # as if so many steps without it had come before
    lasted = stretches(np.concatenate([np.zeros(before, bool), fault]))
    if not lasted:
        return None
    place, end = (bound - before for bound in lasted[-1])
    when = "now" if end == len(fault) - 1 else f"by step {of.steps[end]}, and no more"
    return RunWarning(int(of.steps[place]), title, found.format(first=of.first, last=of.recent[end], when=when), why)
