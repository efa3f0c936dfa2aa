"""The figures of a run that a reader asks for first, from its metrics."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rlvr.pages.charts import is_number
from megatron_rlvr.progress import duration

WINDOW = 20  # steps at either end that the key figures compare


def key_figures(rows: Sequence[dict]) -> list[tuple[str, str, str]]:
    """(name, value, what it is over), as far as the metrics are there."""
    figures = []
    ends = [("Reward", "reward/mean", ".3f", WINDOW), ("Entropy", "policy/entropy", ".3f", WINDOW)]
    held_out = sorted(
        {name for row in rows for name in row if name.startswith("eval/pass@")}, key=lambda name: int(name[10:])
    )
    ends += [(f"Held-out {name[5:]}", name, ".1%", 1) for name in held_out]
    for title, metric, form, window in ends:
        found = values(rows, metric)
        if len(found) == 1:
            figures.append((title, f"{found[0]:{form}}", "measured once"))
        elif found:
            count = min(window, len(found) // 2)
            first, last = mean(found[:count]), mean(found[-count:])
            ratio = f", × {last / first:.2f}" if first > 0 else ""
            span = f"first and last {count} steps" if count > 1 else "first and last"
            figures.append((title, f"{first:{form}} → {last:{form}}", span + ratio))
    if share := values(rows, "lp_reg/share"):
        figures.append(("Regularised tokens", f"{mean(share):.2%}", "mean of all steps"))
    if gap := values(rows, "rollout/log_prob_gap_max"):
        figures.append(("Log-prob gap", f"{max(gap):.1e}" if any(gap) else "0", "largest, policy against engine"))
    checks = [row["sync/verified"] for row in rows if "sync/verified" in row]
    if checks:
        figures.append(
            ("Weight sync", f"{sum(map(bool, checks)):,} of {len(checks):,}", "steps proven equal in the engine")
        )
    if times := values(rows, "time/step"):
        pace = values(rows, "tokens/per_second")
        speed = f", {mean(pace):,.0f} tokens/s" if pace else ""
        figures.append(("Time in steps", duration(sum(times)), f"{mean(times):.2f} s per step{speed}"))
    return figures


def values(rows: Sequence[dict], metric: str) -> list[float]:
    return [row[metric] for row in rows if is_number(row.get(metric))]


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)
