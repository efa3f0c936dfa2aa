"""The parts that a run's report and a comparison of runs are both made of: figures, charts, tables, filters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_rlvr.pages import page
from megatron_rlvr.pages.charts import Chart, draw, identity_of
from megatron_rlvr.run_warnings import RunWarning


def charts(all_charts: Iterable[Chart], rows: Sequence[dict]) -> str:
    """Every chart whose metrics are there."""
    return "".join(filter(None, (chart(one, rows) for one in all_charts)))


def chart(one: Chart, rows: Sequence[dict]) -> str:
    """A figure with its legend and its numbers for the script; empty where there is nothing to draw."""
    drawing = draw(one, rows)
    if drawing is None:
        return ""
    items = "".join(
        f'<li><i style="background:var({colour})"></i>{page.text(label)}</li>' for label, colour in drawing.legend
    )
    legend = f"<ul>{items}</ul>" if items else ""
    identity = f"data-{identity_of(one)}"
    caption = f"<h2>{page.text(one.title)}</h2><p>{page.text(one.note)}</p>{legend}"
    return (
        f'<figure data-chart="{identity}"><figcaption>{caption}</figcaption>'
        f'<div class="plot" tabindex="0">{drawing.svg}<i class="cursor" hidden></i><output></output></div>'
        f"{page.data(identity, drawing.data)}</figure>\n"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], name: str = "") -> str:
    """A table that sorts by a column; a number sorts as what it is, whatever it is shown as: (shown, number).

    ``name`` is the class of its rows, for a filter to find them.
    """
    head = "".join(f'<th scope="col">{page.text(title)}</th>' for title in heads)
    body = "".join(f'<tr class="{name}">{"".join(map(_cell, row))}</tr>' for row in rows)
    return f'<div class="wide"><table class="sorts"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        shown, number = value
        return f'<td class="number" data-value="{number}">{page.text(shown)}</td>'
    return f"<td>{page.text(value)}</td>"


def text_filter(items: str) -> str:
    """A form that hides the elements of the CSS selector ``items`` that lack the text typed; shown by the script."""
    return (
        f'<form class="filter" data-items="{items}" hidden>'
        "<label>Text in them<input type=search></label><output></output></form>"
    )


def warnings(found: Sequence[tuple[str, RunWarning]], is_named: bool) -> str:
    """(run, warning) pairs as a table, with the run's name where the page has several (``is_named``)."""
    if not found:
        said = "No warning: no check found a fault. Most of them compare with the first steps, and need thirty."
        return f'<p class="note">{said}</p>'
    rows = [
        [*([run] if is_named else []), (f"{one.step:,}", one.step), one.title, one.found, one.why] for run, one in found
    ]
    return table([*(["Run"] if is_named else []), "From step", "Warning", "Seen", "Why it matters"], rows)
