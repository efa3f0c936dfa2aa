"""Several runs on one page: their figures in a table, each metric with a line per run, what their configs differ in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from megatron_rlvr.config import flat
from megatron_rlvr.environment import last_start
from megatron_rlvr.pages import page, report_parts
from megatron_rlvr.pages.charts import Chart, is_number, label_of, matching
from megatron_rlvr.pages.key_figures import WINDOW, mean, values
from megatron_rlvr.pages.report import run_config, run_rows, steps_done
from megatron_rlvr.pages.report_charts import charts_of
from megatron_rlvr.pages.report_script import SCRIPT
from megatron_rlvr.pages.report_style import STYLE
from megatron_rlvr.run_warnings import warnings

MOST_RUNS = 6

# Metric -> (title, format): the columns of the table, over the last WINDOW steps; eval/* the last measured one.
COLUMNS = {
    "reward/mean": ("reward", ".3f"),
    "policy/entropy": ("entropy", ".3f"),
    "tokens/response_mean": ("length", ".1f"),
    "rollout/calibration_gap": ("calibration gap", ".3f"),
    "policy/clip_share": ("clipped", ".2%"),
    "time/step": ("s per step", ".2f"),
    "tokens/per_second": ("tokens/s", ",.0f"),
}
MEDIANS = ("rollout/calibration_gap",)  # one response can have a perplexity of hundreds; the others are means


@dataclass(frozen=True)
class RunRecord:
    """A run as a comparison sees it; ``config`` is flat: {"trainer.num_steps": 200}."""

    name: str
    rows: list[dict]
    config: dict[str, Any]


def build_comparison(run_dirs: Sequence[str | Path], target: Path) -> Path:
    """Write the comparison of the runs to ``target`` and return it.

    Raises FileNotFoundError and ValueError as build_report; ValueError for more than MOST_RUNS.
    """
    if not 2 <= len(run_dirs) <= MOST_RUNS:
        raise ValueError(
            f"a comparison is of 2 to {MOST_RUNS} runs, not {len(run_dirs)}: that many lines can be told apart"
        )
    runs = [_read(Path(folder), [Path(other) for other in run_dirs]) for folder in run_dirs]
    title = " · ".join(run.name for run in runs)
    found = [(run.name, warning) for run in runs for warning in warnings(run.rows)]
    body = f"""<header>
<h1>{len(runs)} runs</h1>
<p>{page.text(title)}</p>
</header>
<main>
<section><h2>Figures</h2>{_table(runs)}
<p class="note">Means over the last {WINDOW} steps (of the calibration gap the median); held-out
figures as last measured.</p></section>
<section><h2>Warnings</h2>{report_parts.warnings(found, is_named=True)}</section>
<section class="charts" aria-label="Charts">{_charts(runs)}</section>
<section><h2>What their configurations differ in</h2>{_differences(runs)}</section>
</main>"""
    return page.write(target, page.document(f"{title} · comparison", body, STYLE, SCRIPT))


def _read(folder: Path, all_folders: list[Path]) -> RunRecord:
    rows = run_rows(folder)
    config = run_config(folder)
    config |= {key: value for key, value in last_start(folder).items() if key == "exploration"}  # all of its options
    names = [path.resolve().name for path in all_folders]
    name = folder.resolve().name
    # two runs of the same folder name are told apart by the folders above
    return RunRecord(name if names.count(name) == 1 else str(folder), rows, flat(config))


def _table(runs: list[RunRecord]) -> str:
    held_out = sorted({name for run in runs for row in run.rows for name in row if name.startswith("eval/pass@")})
    columns = {name: (name.removeprefix("eval/"), ".1%", 1) for name in held_out}
    columns |= {name: (title, form, WINDOW) for name, (title, form) in COLUMNS.items()}
    table = []
    for run in runs:
        steps = steps_done(run.rows)
        cells: list[object] = [run.name, (f"{steps:,}", steps)]
        for metric, (_, form, window) in columns.items():
            found = values(run.rows, metric)[-window:]
            middle = (median if metric in MEDIANS else mean)(found) if found else 0.0
            cells.append((f"{middle:{form}}", middle) if found else ("–", ""))
        table.append(cells)
    return report_parts.table(["Run", "steps", *(title for title, _, _ in columns.values())], table)


def _charts(runs: list[RunRecord]) -> str:
    """Each metric of the report's charts, a line per run."""
    names = sorted({name for run in runs for row in run.rows for name in row if is_number(row.get(name))})
    methods = {key.split(".")[1] for run in runs for key in run.config if key.startswith("exploration.")}
    drawn = []
    for chart in charts_of([row for run in runs for row in run.rows], methods):
        for metric, label in _metrics(chart, names).items():
            title = f"{chart.title}: {label}" if label else chart.title
            lines = {_line(place, metric): run.name for place, run in enumerate(runs)}
            one = replace(chart, title=title, kind=_kind(chart), metrics=lines, whole="")
            drawn.append(report_parts.chart(one, _merged(runs, metric)))
    return "".join(drawn)


def _kind(chart: Chart) -> Literal["smooth", "lines", "points"]:
    if chart.kind == "points":
        return "points"
    return "lines" if chart.log else "smooth"


def _metrics(chart: Chart, names: list[str]) -> dict[str, str]:
    """Metric -> its label, of those that a chart shows; of the phases of a step, the whole."""
    if chart.whole:
        return {chart.whole: ""}
    found: dict[str, str] = {}
    for pattern, label in chart.metrics.items():
        found |= {name: label_of(name, label) if "*" in pattern else label for name in matching(names, pattern)}
    return found


def _merged(runs: list[RunRecord], metric: str) -> list[dict]:
    """Rows by step with one metric per run."""
    by_step: dict[int, dict] = {}
    for place, run in enumerate(runs):
        for row in run.rows:
            if metric in row:
                by_step.setdefault(row["step"], {"step": row["step"]})[_line(place, metric)] = row[metric]
    return [by_step[step] for step in sorted(by_step)]


def _line(place: int, metric: str) -> str:
    """What the metric of a run is called; a maximum stays one, so that it is drawn as one."""
    return f"run {place}{'_max' if metric.endswith('_max') else ''}"


def _differences(runs: list[RunRecord]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    differing = [key for key in keys if len({repr(run.config.get(key)) for run in runs}) > 1]
    if not differing:
        return '<p class="note">Nothing.</p>'
    rows = [[key, *(_shown(run.config, key) for run in runs)] for key in differing]
    return report_parts.text_filter("tr.setting") + report_parts.table(
        ["Key", *(run.name for run in runs)], rows, "setting"
    )


def _shown(config: dict[str, Any], key: str) -> str:
    return str(config[key]) if key in config else "–"
