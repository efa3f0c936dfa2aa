"""The figures of the Lp-Reg and CDE papers for runs of one's own, from what their folders hold.

    for name, draw in FIGURES.items():
        figure = draw(runs)             a matplotlib figure, or None where no run has what it shows

arXiv 2510.03222v2 (Lp-Reg): probability of exploratory against irrelevant words, probability and entropy of tokens,
the share of improbable tokens that survives the filter, delta, entropy by method. arXiv 2509.09675v1 (CDE): calibration
(Fig 9), disagreement of the critic's heads, bonus and its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_rlvr.pages.charts import REACH, Chart, Line, read_lines, running_mean
from megatron_rlvr.pages.report import run_rows
from megatron_rlvr.pages.words import EXPLORATORY, IRRELEVANT, some_records, word_rows
from megatron_rlvr.token_records import TokenRecord

COLOURS = ("#2a6fdb", "#e08a1e", "#2f9e73", "#8a5bd1", "#d1477a", "#5c6875")
DASHES = ("-", "--", ":")
MOST_POINTS = 4000  # of a scatter
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "figure",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e1e5ea",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class RunData:
    """A run's metrics and, of at most words.MOST_RECORDS steps, its tokens."""

    name: str
    rows: list[dict]
    records: list[TokenRecord]


def read_run(folder: str | Path) -> RunData:
    """Raises FileNotFoundError and ValueError as report.build_report."""
    folder = Path(folder)
    name = folder.resolve().name.replace("$", r"\$")  # which begins a formula in matplotlib
    return RunData(name, run_rows(folder), some_records(folder))


def word_probability(runs: Sequence[RunData]) -> Figure | None:
    """Mean probability of the tokens that are exploratory words, and of those that are irrelevant ones."""
    found = [RunData(run.name, word_rows(run.records), []) for run in runs]
    labels = {"words/exploratory": ", ".join(EXPLORATORY), "words/irrelevant": ", ".join(IRRELEVANT)}
    return _curves(found, labels, "probability of the sampled token")


def probability_entropy(runs: Sequence[RunData]) -> Figure | None:
    """A point per recorded token, of the newest recorded steps that fill the picture."""
    held = [(run, points) for run in runs if len(points := _points(run.records))]
    if not held:
        return None
    figure, axes = _new("probability", "entropy, nats")
    style: dict[str, Any] = {"s": 7, "alpha": 0.4, "linewidths": 0}
    clouds: list[Artist] = [
        axes.scatter(points[:, 0], points[:, 1], color=COLOURS[place % 6], label=run.name, **style)
        for place, (run, points) in enumerate(held)
    ]
    axes.set_xscale("log")
    return _with_legend(figure, axes, clouds)


def survivors(runs: Sequence[RunData]) -> Figure | None:
    """The share of the lowest-rho tokens that Lp-Reg's filter keeps."""
    return _curves(runs, {"lp_reg/survive_share": "survive the filter"}, "share of the least probable tokens")


def delta(runs: Sequence[RunData]) -> Figure | None:
    """The probability below which Lp-Reg calls a token improbable."""
    return _curves(runs, {"lp_reg/delta": "delta"}, "probability")


def entropy(runs: Sequence[RunData]) -> Figure | None:
    """The policy's entropy, a line per run."""
    return _curves(runs, {"policy/entropy": "entropy"}, "nats per token")


def calibration(runs: Sequence[RunData]) -> Figure | None:
    """Mean perplexity of right and of wrong responses: where they meet, calibration has collapsed."""
    labels = {"rollout/perplexity_right": "right", "rollout/perplexity_wrong": "wrong"}
    return _curves(runs, labels, "perplexity of a response")


def head_disagreement(runs: Sequence[RunData]) -> Figure | None:
    """Standard deviation over the critic's heads, by the data that it is measured on."""
    names = sorted({name for run in runs for row in run.rows for name in row if name.endswith("head_std")})
    known = {"critic/head_std": "training", "eval/head_std": "held-out"}
    labels = {name: known.get(name, name.removesuffix("/head_std").removeprefix("eval/")) for name in names}
    return _curves(runs, labels, "standard deviation over heads")


def bonus(runs: Sequence[RunData]) -> Figure | None:
    """CDE's mean bonus."""
    return _curves(runs, {"cde/bonus": "actor", "cde/critic_bonus": "critic"}, "mean bonus")


def omega(runs: Sequence[RunData]) -> Figure | None:
    """The weight of CDE's bonus by its schedule."""
    return _curves(runs, {"cde/omega": "actor", "cde/critic_omega": "critic"}, "omega", smooth=False)


FIGURES: dict[str, Callable[[Sequence[RunData]], Figure | None]] = {
    one.__name__: one
    for one in (
        word_probability,
        probability_entropy,
        survivors,
        delta,
        entropy,
        calibration,
        head_disagreement,
        bonus,
        omega,
    )
}


def write_figures(folders: Sequence[str | Path], target: Path) -> dict[str, list[Path]]:
    """Figure -> its files, NAME.svg and NAME.png in ``target``; [] where no run has what it shows."""
    runs = [read_run(folder) for folder in folders]
    target.mkdir(parents=True, exist_ok=True)
    written: dict[str, list[Path]] = {}
    for name, draw in FIGURES.items():
        with rc_context(RC):
            figure = draw(runs)
            written[name] = [target / f"{name}.{suffix}" for suffix in ("svg", "png")] if figure else []
            for path in written[name]:
                figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)  # type: ignore[union-attr]
    return written


def _curves(runs: Sequence[RunData], labels: dict[str, str], unit: str, smooth: bool = True) -> Figure | None:
    """The metrics by step: a colour per run and a dash per metric, or a colour per metric where there is one run."""
    lines: list[tuple[int, int, str, Line]] = []
    for place, run in enumerate(runs):
        for number, (metric, label) in enumerate(labels.items()):
            several = " · ".join([run.name] * (len(runs) > 1) + [label] * (len(labels) > 1))
            found = read_lines(Chart("", "", "lines", {metric: several}), run.rows)
            lines += [(place, number, several, line) for line in found]
    if not lines:
        return None
    figure, axes = _new("step", unit)
    drawn: list[Artist] = []
    for place, number, label, line in lines:
        colour = COLOURS[(place if len(runs) > 1 else number) % 6]
        dash = DASHES[number % 3] if len(runs) > 1 else "-"
        reach = min(REACH, len(line.values) // 10) if smooth else 0
        if reach:
            axes.plot(line.steps, line.values, color=colour, linewidth=0.7, alpha=0.2)
        drawn += axes.plot(line.steps, running_mean(line.values, reach), dash, color=colour, linewidth=1.7, label=label)
    return _with_legend(figure, axes, drawn)


def _points(records: Sequence[TokenRecord]) -> np.ndarray:
    """[n, 2] probability and entropy, of judged responses, those of the last steps first."""
    pairs = [
        torch.stack([record.columns["log_prob"].exp(), record.columns["entropy"]], dim=1)[record.judged()].numpy()
        for record in reversed(records)
    ]
    return np.concatenate(pairs)[:MOST_POINTS] if pairs else np.zeros((0, 2))


def _new(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def _with_legend(figure: Figure, axes: Axes, drawn: list[Artist]) -> Figure:
    """A legend where there are several; they are named to it, or it would leave out labels like _this."""
    if len(drawn) > 1:
        axes.legend(handles=drawn, fontsize=8)
    return figure
