"""Metrics -> small SVG charts, drawn by matplotlib and coloured by the page that holds them.

matplotlib draws in placeholder colours, which become CSS variables: one drawing serves light and dark pages alike.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from html import escape
from itertools import cycle
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

REACH = 10  # steps before and after that the bold line averages; fewer in a short run
MOST_POINTS = 400  # per line; longer runs are drawn as the means of as many equal spans
COLOURS = [f"#f0000{place:x}" for place in range(1, 11)]  # placeholders of --c1 .. --c10
FRAME = (0.125, 0.185, 0.855, 0.775)  # of the axes: equal in every chart, so that columns of charts align
GRID, TEXT, REST = "#f000f0", "#f000f1", "#f000f2"
VARIABLES = {colour: f"--c{place}" for place, colour in enumerate(COLOURS, start=1)}
VARIABLES |= {GRID: "--grid", TEXT: "--muted", REST: "--rest"}
RC: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "chart", "font.size": 10.5, "font.family": "DejaVu Sans"}


@dataclass(frozen=True)
class Chart:
    """What one chart shows.

    Chart("Held-out answers", "share of right answers", "points", {"eval/pass@*": ""}, percent=True): every metric that
    matches a pattern, oldest name first; an empty label stands for the metric's name after the slash, "*" for what is
    between its first and last one.

    trend: one metric, each step faint and its running mean bold; smooth: the same of several; lines: metrics by step;
    points: metrics that only some steps have; stack: metrics that add up, what is missing to the ``whole`` on top.
    """

    title: str
    note: str
    kind: Literal["trend", "smooth", "lines", "points", "stack"]
    metrics: dict[str, str]
    percent: bool = False
    log: bool = False
    whole: str = ""
    cut: bool = False  # of trend and smooth: rare peaks leave the picture instead of flattening the rest


@dataclass(frozen=True)
class Drawing:
    """A chart drawn: inline SVG, its legend as (label, CSS variable), and what is in it for a script to read out.

    A chart of one metric needs no legend. ``data``: {"x": [left end, right end], "lines": [{label, span, steps,
    values}]}, in steps; a value stands for ``span`` of them, whose middle is its step.
    """

    svg: str
    legend: list[tuple[str, str]]
    data: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A metric's finite values and their steps, [n] each; the colour is its place in the chart, whatever is missing."""

    name: str
    label: str
    colour: str
    steps: np.ndarray
    values: np.ndarray

    @property
    def peak(self) -> Callable[[np.ndarray], float]:
        """What stands for a span of steps: of a metric that is a maximum, the largest."""
        return np.max if self.name.endswith("_max") else np.mean

    @property
    def span(self) -> float:
        """Steps that a point of the chart stands for."""
        is_thinned = len(self.steps) > MOST_POINTS
        return float(self.steps[-1] - self.steps[0] + 1) / MOST_POINTS if is_thinned else 1.0


def draw(chart: Chart, rows: Sequence[dict]) -> Drawing | None:
    """The chart over the rows of metrics.jsonl, or None where fewer than two rows have what it shows."""
    lines = read_lines(chart, rows)
    if not lines:
        return None
    with rc_context(RC):
        figure = Figure(figsize=(4.8, 2.5))
        axes = figure.add_axes(FRAME)
        legend = _DRAW[chart.kind](axes, lines, chart, rows)
        _style(axes, chart)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Drawing(_embed(buffer.getvalue(), chart, lines), legend, _data(lines, axes))


def _data(lines: list[Line], axes: Axes) -> dict[str, Any]:
    def plain(values: np.ndarray, reduce: Callable[[np.ndarray], float] = np.mean) -> list[float]:
        return [float(f"{value:.5g}") for value in thin(values, reduce)]

    series = [
        {
            "label": line.label,
            "span": line.span,
            "steps": plain(line.steps),
            "values": plain(line.values, line.peak),
        }
        for line in lines
    ]
    return {"x": [float(end) for end in axes.get_xlim()], "lines": series}


def read_lines(chart: Chart, rows: Sequence[dict]) -> list[Line]:
    """The chart's metrics that have a finite value in two rows or more: one makes no line."""
    names = sorted({name for row in rows for name in row}, key=_by_number)
    found = []
    for place, (pattern, label) in enumerate(chart.metrics.items()):
        for colour, name in zip(cycle(COLOURS[place:] + COLOURS[:place]), matching(names, pattern), strict=False):
            pairs = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
            if len(pairs) > 1:
                steps, values = np.array(pairs, dtype=float).T
                found.append(Line(name, label_of(name, label), colour, steps, values))
    return found


def identity_of(chart: Chart) -> str:
    """What begins the ids of a chart in its page: titles that differ in a sign or in their case get two."""
    words = re.sub(r"\W+", "-", chart.title.lower())
    return f"{words}-{zlib.crc32(chart.title.encode()):08x}"


def matching(names: Sequence[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatch(name, pattern)]


def label_of(name: str, label: str) -> str:
    """What a legend calls the metric: its ``label`` in the chart; "": its last part, "*": what is in the middle."""
    between, _, last = name.partition("/")[2].rpartition("/")
    return between if label == "*" else label or last


def is_number(value: object) -> bool:
    """Whether a value of metrics.jsonl is a finite number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """[n] -> [n]: each value's mean with up to ``reach`` on either side; centred, so that it does not lag behind."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    start, end = np.maximum(0, place - reach), np.minimum(len(values), place + reach + 1)
    return (total[end] - total[start]) / (end - start)


def running_median(values: np.ndarray, reach: int) -> np.ndarray:
    """[n] -> [n]: as running_mean, and blind to rare peaks."""
    return np.array([np.median(values[max(0, place - reach) : place + reach + 1]) for place in range(len(values))])


def thin(values: np.ndarray, reduce: Callable[[np.ndarray], float] = np.mean) -> np.ndarray:
    """[n] -> [min(n, MOST_POINTS)]: each of equal spans reduced to one value, so that a long run's page stays small."""
    if len(values) <= MOST_POINTS:
        return values
    return np.array([reduce(span) for span in np.array_split(values, MOST_POINTS)])


def _trend(axes: Axes, lines: list[Line], chart: Chart, rows: Sequence[dict]) -> list[tuple[str, str]]:
    faint = 0.45 if len(lines) == 1 else 0.2
    for line in lines:
        smooth = (running_median if chart.cut else running_mean)(line.values, min(REACH, len(line.values) // 10))
        values = thin(line.values, line.peak)
        axes.plot(thin(line.steps), values, color=line.colour, linewidth=0.9, alpha=faint, clip_on=chart.cut)
        axes.plot(thin(line.steps), thin(smooth), color=line.colour, linewidth=1.9, clip_on=chart.cut)
    if chart.cut:
        axes.set_ylim(0, 1.2 * max(float(np.percentile(line.values, 95)) for line in lines))
    return _legend(chart, [(line.label, line.colour) for line in lines])


def _lines(axes: Axes, lines: list[Line], chart: Chart, rows: Sequence[dict]) -> list[tuple[str, str]]:
    marker = "o" if chart.kind == "points" else ""
    for line in lines:
        values = thin(line.values, line.peak)
        axes.plot(
            thin(line.steps), values, color=line.colour, linewidth=1.5, marker=marker, markersize=3.5, clip_on=False
        )
    return _legend(chart, [(line.label, line.colour) for line in lines])


def _stack(axes: Axes, lines: list[Line], chart: Chart, rows: Sequence[dict]) -> list[tuple[str, str]]:
    whole = read_lines(Chart("", "", "lines", {chart.whole: ""}), rows)
    steps = whole[0].steps if whole else lines[0].steps
    parts = [np.where(np.isin(steps, line.steps), np.interp(steps, line.steps, line.values), 0.0) for line in lines]
    entries = [(line.label, line.colour) for line in lines]
    if whole:
        parts.append(np.maximum(0.0, whole[0].values - sum(parts)))
        entries.append(("other", REST))
    colours = [colour for _, colour in entries]
    axes.stackplot(thin(steps), [thin(part) for part in parts], colors=colours, linewidth=0)
    # A first step that warms up can take ten times as long as the rest: it leaves the picture instead of flattening it.
    axes.set_ylim(0, float(np.percentile(np.sum(parts, axis=0), 98)) or 1.0)
    return _legend(chart, entries)


_DRAW = {"trend": _trend, "smooth": _trend, "lines": _lines, "points": _lines, "stack": _stack}


def _legend(chart: Chart, entries: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """None for a line that is alone and cannot be another one."""
    is_plain = len(entries) == len(chart.metrics) == 1
    return [] if is_plain else [(label, VARIABLES[colour]) for label, colour in entries]


def _style(axes: Axes, chart: Chart) -> None:
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0, labelcolor=TEXT, pad=5)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("step", color=TEXT, labelpad=2)
    axes.margins(x=0.02)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    if chart.log and 0 < axes.dataLim.minposy < math.inf:
        _log_scale(axes)
        return
    low = min(0.0, axes.dataLim.ymin)
    high = axes.get_ylim()[1] if axes.dataLim.ymax > 0 else 0.0
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high if high > low else 1.0)
    axes.set_yticks(ticks)
    axes.set_ylim(ticks[0], ticks[-1])  # from a labelled line to a labelled line
    scale, unit = (100, "%") if chart.percent else (1, "")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * scale:,.6g}{unit}"))


def _log_scale(axes: Axes) -> None:
    """Whole powers of ten below and above the data: at least two labelled lines, whatever the range."""
    axes.set_yscale("log", nonpositive="mask")
    low, high = math.floor(math.log10(axes.dataLim.minposy)), math.ceil(math.log10(axes.dataLim.ymax))
    axes.set_ylim(10.0**low, 10.0 ** max(high, low + 1))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e"))
    )
    axes.minorticks_off()


def _embed(svg: str, chart: Chart, lines: list[Line]) -> str:
    """matplotlib's file as a part of an HTML page: no header, no metadata, no page-wide style, no repeated ids."""
    spans = [f"{line.label} from {line.values[0]:.4g} to {line.values[-1]:.4g}" for line in lines]
    label = escape(f"{chart.title}, {chart.note}: {'; '.join(spans)}", quote=True)
    svg = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg, count=1
    )
    prefix = identity_of(chart)
    svg = re.sub(r'((?:xlink:)?href="#|url\(#|\bid=")', rf"\g<1>{prefix}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()


def _by_number(name: str) -> tuple[str, int, str]:
    """pass@4 before pass@16."""
    stem, _, count = name.partition("@")
    return stem, int(count) if count.isdigit() else 0, name
