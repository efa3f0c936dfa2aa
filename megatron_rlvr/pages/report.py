"""RUN/report.html: what a run did, as one page that needs no network and no other file."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import yaml

from megatron_rlvr.config import flat
from megatron_rlvr.metrics import row_is_right
from megatron_rlvr.pages import page, report_parts
from megatron_rlvr.pages.charts import REACH
from megatron_rlvr.pages.key_figures import key_figures
from megatron_rlvr.pages.report_charts import charts_of
from megatron_rlvr.pages.report_script import SCRIPT
from megatron_rlvr.pages.report_style import STYLE
from megatron_rlvr.pages.rollout_page import build_rollout_page
from megatron_rlvr.pages.words import some_records, word_rows
from megatron_rlvr.records import newest_rows, read_rows
from megatron_rlvr.run_warnings import warnings
from megatron_rlvr.token_records import page_path, recorded_steps

EXAMPLES = 4  # right responses, and as many wrong ones
NEWEST = 2**23  # bytes of rollouts.jsonl that they are looked for in: ranks wait while a report is built


def build_report(run_dir: str | Path) -> Path:
    """Write RUN/report.html from what the run has logged so far, and return its path.

    Reads metrics.jsonl, and config.yaml, the end of rollouts.jsonl and summary.json where they are there; the newest
    whole step of the flight recorder gets its page too. Raises FileNotFoundError: no metrics.jsonl; ValueError: it
    holds no step yet, or a line that is no JSON object.
    """
    run_dir = Path(run_dir)
    rows = run_rows(run_dir)
    config = run_config(run_dir)
    rollouts = newest_rows(run_dir / "rollouts.jsonl", NEWEST) if (run_dir / "rollouts.jsonl").exists() else []
    if records := some_records(run_dir):
        build_rollout_page(run_dir, records[-1].step)
    charted, drawn = [*rows, *word_rows(records)], charts_of(rows, config.get("exploration") or ())
    name = config.get("name") or run_dir.resolve().name
    found = [(name, warning) for warning in warnings(rows)]
    body = f"""<header>
<h1>{page.text(name)}</h1>
<p>{page.text(" · ".join(_setup(rows, config)))}</p>
</header>
<main>
<dl class="figures">{"".join(_figure(*item) for item in key_figures(rows))}</dl>
<section aria-label="Warnings"><h2>Warnings</h2>{report_parts.warnings(found, is_named=False)}</section>
<section class="charts" aria-label="Charts">{report_parts.charts(drawn, charted)}</section>
<p class="note">A bold line over a faint one is the mean of up to {REACH} values before and after each; where peaks
are cut the median. Point at a chart, or focus it and use the arrow keys, to read it.</p>
{_examples(rollouts)}
{_recorded(run_dir, recorded_steps(run_dir))}
{_configuration(_read(run_dir / "config.yaml"))}
</main>"""
    return page.write(run_dir / "report.html", page.document(f"{name} · run report", body, STYLE, SCRIPT))


def run_config(run_dir: Path) -> dict:
    """What config.yaml holds; {} without one. Raises ValueError: it is no YAML, or no mapping."""
    source = run_dir / "config.yaml"
    try:
        config = yaml.safe_load(_read(source)) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is no YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{source} is no mapping of keys to values")
    return config


def run_rows(run_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl, and behind them one for the held-out figures of the finished run, if it is.

    Row N holds the held-out figures from before step N, so those of the finished run belong one step further.
    """
    source = run_dir / "metrics.jsonl"
    if not source.exists():
        raise FileNotFoundError(
            f"{source} does not exist: name the folder of a run that has finished at least one step"
        )
    rows = read_rows(source)
    if not rows:
        raise ValueError(f"{source} holds no step yet: the report can be built once the first one is logged")
    try:
        summary = json.loads(_read(run_dir / "summary.json") or "{}")
    except ValueError as error:
        raise ValueError(f"{run_dir / 'summary.json'} is no JSON: {error}") from error
    is_of_now = summary.get("steps") == rows[-1]["step"]  # and not of the run before it was given more steps
    final = {key: value for key, value in summary.items() if is_of_now and key.startswith("eval/")}
    return [*rows, {"step": rows[-1]["step"] + 1, **final}] if final else rows


def steps_done(rows: list[dict]) -> int:
    """The last step that was trained; the row of the finished run's held-out figures is none."""
    trained = [row["step"] for row in rows if not all(name == "step" or name.startswith("eval/") for name in row)]
    return max(trained, default=rows[-1]["step"])


def _setup(rows: list[dict], config: dict) -> list[str]:
    """What the run is, in a line; a config without a key leaves its part out."""
    done, settings = steps_done(rows), flat(config)
    planned = settings.get("trainer.num_steps")
    parts = [f"{done:,} of {planned:,} steps" if planned else f"steps: {done:,}"]
    prompts, responses = (settings.get(f"rollout.{name}") for name in ("prompts_per_step", "responses_per_prompt"))
    if prompts and responses:
        parts.append(f"{prompts} prompts × {responses} responses per step")
    if config.get("verifier"):
        parts.append(f"{config['verifier']} verifier")
    if config.get("exploration"):
        parts.append(" + ".join(config["exploration"]))
    sizes = {axis: settings.get(f"parallel.{axis}") for axis in ("tp", "cp", "pp", "dp")}
    parts += [" × ".join(f"{axis} {size}" for axis, size in sizes.items() if size)]
    return [part for part in parts if part]


def _figure(name: str, value: str, note: str) -> str:
    return (
        f"<div><dt>{page.text(name)}</dt>"
        f"<dd><strong>{page.text(value)}</strong><span>{page.text(note)}</span></dd></div>"
    )


def _examples(rollouts: list[dict]) -> str:
    """The newest right and wrong responses, side by side."""
    right, wrong = (
        list(islice((row for row in reversed(rollouts) if row_is_right(row) is said), EXAMPLES))
        for said in (True, False)
    )
    columns = "".join(
        f'<div><h3 class="{name}">{title}</h3>{"".join(map(_example, chosen))}</div>'
        for name, title, chosen in (("right", "Right", right), ("wrong", "Wrong", wrong))
        if chosen
    )
    if not columns:
        return ""
    search = report_parts.text_filter(".examples article")
    return f'<section><h2>Latest responses</h2>{search}<div class="examples">{columns}</div></section>'


def _example(row: dict) -> str:
    tokens, reason = row.get("tokens", "?"), {"length": ", cut off"}.get(row.get("finish_reason", ""), "")
    head = (
        f"step {row['step']} · prompt {row.get('prompt_id', '?')} · reward {row['reward']:g} · {tokens} tokens{reason}"
    )
    parts = [("Prompt", row.get("prompt")), ("Response", row.get("response")), ("Read as", row.get("extracted"))]
    parts += [("Answer", row.get("answer"))]
    body = "".join(f"<dt>{name}</dt><dd>{page.pre(value)}</dd>" for name, value in parts if value is not None)
    return f"<article><p>{page.text(head)}</p><dl>{body}</dl></article>"


def _recorded(run_dir: Path, steps: list[int]) -> str:
    """Links to the pages of tokens that there are, and how the others are made."""
    if not steps:
        return ""
    pages = [step for step in steps if page_path(run_dir, step).exists()]
    links = " · ".join(f'<a href="tokens/{page_path(run_dir, step).name}">step {step:,}</a>' for step in pages)
    return (
        f"<section><h2>Token by token</h2><p>{links}</p>"
        f'<p class="note">The flight recorder kept steps {steps[0]:,} to {steps[-1]:,}; '
        f"<code>python tools/show_rollouts.py {page.text(run_dir)} --step N</code> makes the page of another.</p>"
        "</section>"
    )


def _configuration(text: str) -> str:
    return f"<section><details><summary>Configuration</summary>{page.pre(text)}</details></section>" if text else ""


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
