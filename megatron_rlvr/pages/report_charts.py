"""Which charts a report has, in its order; a comparison of runs draws each of their metrics with a line per run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from glob import escape

from megatron_rlvr.pages.charts import Chart, is_number, matching

PHASES = {
    "time/generate": "generate",
    "time/verify": "verify",
    "time/gather": "gather responses",
    "time/reference": "reference",
    "time/log_probs": "log-probs",
    "time/states": "states",
    "time/values": "values",
    "time/critic": "train critic",
    "time/train": "train",
    "time/sync": "weight sync",
}

CHARTS = [
    Chart("Reward", "the verifier's, mean over the step's responses", "trend", {"reward/mean": ""}),
    Chart(
        "Prompts of one kind",
        "share whose responses are all right, or all wrong: they tell GRPO nothing",
        "smooth",
        {"reward/always_right_share": "all right", "reward/never_right_share": "all wrong"},
        percent=True,
    ),
    Chart("Held-out prompts", "share solved", "points", {"eval/pass@*": ""}, percent=True),
    Chart("Held-out sources", "pass@1 of each", "points", {"eval/*/pass@1": "*"}, percent=True),
    Chart("Entropy", "of the policy, nats per token", "trend", {"policy/entropy": ""}),
    Chart(
        "Distinct answers",
        "per held-out prompt",
        "points",
        {"eval/distinct": "different", "eval/distinct_right": "and right"},
    ),
    Chart("Response length", "tokens, mean over the step's responses", "trend", {"tokens/response_mean": ""}),
    Chart(
        "Calibration",
        "perplexity of right and wrong responses; where both meet, calibration has collapsed (rare peaks are cut)",
        "smooth",
        {"rollout/perplexity_right": "right", "rollout/perplexity_wrong": "wrong"},
        cut=True,
    ),
    Chart(
        "Words that explore",
        "mean probability, in the recorded responses",
        "smooth",
        {"words/exploratory": "but, wait, perhaps ...", "words/irrelevant": "cost, fine, balanced ..."},
    ),
    Chart("Regularised tokens", "share that Lp-Reg protects", "trend", {"lp_reg/share": ""}, percent=True),
    Chart(
        "Survivors of the filter",
        "share of the least probable tokens that Lp-Reg's proxy keeps",
        "trend",
        {"lp_reg/survive_share": ""},
        percent=True,
    ),
    Chart("Kept mass", "probability that the proxy keeps, at regularised tokens", "trend", {"lp_reg/kept_mass": ""}),
    Chart("Delta", "probability below which Lp-Reg calls a token improbable", "trend", {"lp_reg/delta": ""}),
    Chart(
        "CDE bonus",
        "mean over responses (actor) and tokens (critic)",
        "smooth",
        {"cde/bonus": "actor", "cde/critic_bonus": "critic"},
    ),
    Chart("CDE weight", "omega, by its schedule", "lines", {"cde/omega": "actor's", "cde/critic_omega": "critic's"}),
    Chart("Explained variance", "of the returns, by the critic", "trend", {"critic/explained_variance": ""}),
    Chart(
        "Disagreement of the critic's heads",
        "standard deviation",
        "smooth",
        {"critic/head_std": "training", "eval/head_std": "held-out", "eval/*/head_std": "*"},
    ),
    Chart("Time per step", "seconds, by phase; rare slow steps leave the picture", "stack", PHASES, whole="time/step"),
    Chart(
        "Log-prob gap",
        "between policy and engine, log scale",
        "lines",
        {"rollout/log_prob_gap_mean": "mean", "rollout/log_prob_gap_max": "largest"},
        log=True,
    ),
    Chart("Gradient norm", "before clipping", "trend", {"policy/grad_norm": ""}),
    Chart("Clipped tokens", "share whose ratio met a clip", "trend", {"policy/clip_share": ""}, percent=True),
    Chart("Largest ratio", "p / old p of any token in the step", "trend", {"policy/ratio_max": ""}),
    Chart(
        "KL",
        "nats per token, estimated",
        "smooth",
        {"policy/kl": "from the policy that sampled", "policy/ref_kl": "from the reference"},
    ),
    Chart("Speed", "response tokens per second of a step", "trend", {"tokens/per_second": ""}),
    Chart(
        "Truncated responses", "share that met the length limit", "trend", {"rollout/truncated_share": ""}, percent=True
    ),
    Chart(
        "Memory",
        "GiB per rank; without a GPU the most that the process has held",
        "lines",
        {"memory/rank_most_gib": "fullest rank", "memory/rank_least_gib": "emptiest"},
    ),
]

# Of a run whose methods turn groups away; in another one both are always 1.
SAMPLING = [
    Chart("Kept groups", "share that no method turned away", "trend", {"rollout/kept_share": ""}, percent=True),
    Chart("Generations", "until enough groups were kept", "trend", {"rollout/generations": ""}),
]


def charts_of(rows: Sequence[dict], methods: Iterable[str]) -> list[Chart]:
    """CHARTS, the figures of sampling that goes on, and whatever else the exploration methods have measured."""
    names = sorted({name for row in rows for name in row if is_number(row.get(name))})
    sampling = [chart for chart in SAMPLING if any(row.get(name, 1) != 1 for name in chart.metrics for row in rows)]
    drawn = {name for chart in CHARTS for pattern in chart.metrics for name in matching(names, pattern)}
    own = [name for name in names if name.partition("/")[0] in set(methods) and name not in drawn]
    return [*CHARTS, *sampling, *(Chart(_title(name), name, "trend", {escape(name): ""}) for name in own)]


def _title(metric: str) -> str:
    """sim_hash/largest_share -> sim hash: largest share."""
    return ": ".join(metric.split("/", 1)).replace("_", " ")
