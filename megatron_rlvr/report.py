"""RUN/report.html: what a run did, as one page that needs no network, no script and no other file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import yaml

from megatron_rlvr.charts import REACH, Chart, draw, is_number
from megatron_rlvr.progress import duration
from megatron_rlvr.records import read_rows
from megatron_rlvr.report_style import STYLE

WINDOW = 20  # steps at either end that the key figures compare
EXAMPLES = 4  # right responses, and as many wrong ones
LONGEST = 4000  # characters of an example
RIGHT_ABOVE = 0.5  # reward of a response that counts as right

PHASES = {
    "time/generate": "generate",
    "time/verify": "verify",
    "time/log_probs": "log-probs",
    "time/values": "values",
    "time/critic": "train critic",
    "time/train": "train",
    "time/sync": "weight sync",
}

CHARTS = [
    Chart("Reward", "the verifier's, mean over the step's responses", "trend", {"reward/mean": ""}),
    Chart("Held-out prompts", "share solved", "points", {"eval/pass@*": ""}, percent=True),
    Chart("Entropy", "of the policy, nats per token", "trend", {"policy/entropy": ""}),
    Chart(
        "Distinct answers",
        "per held-out prompt",
        "points",
        {"eval/distinct": "different", "eval/distinct_right": "and right"},
    ),
    Chart("Response length", "tokens, mean over the step's responses", "trend", {"tokens/response_mean": ""}),
    Chart("Regularised tokens", "share that Lp-Reg protects", "trend", {"lp_reg/share": ""}, percent=True),
    Chart("Explained variance", "of the returns, by the critic", "trend", {"critic/explained_variance": ""}),
    Chart("Disagreement of the critic's heads", "standard deviation", "trend", {"critic/head_std": ""}),
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
    Chart("Speed", "response tokens per second of a step", "trend", {"tokens/per_second": ""}),
    Chart(
        "Truncated responses", "share that met the length limit", "trend", {"rollout/truncated_share": ""}, percent=True
    ),
]


def build_report(run_dir: str | Path) -> Path:
    """Write RUN/report.html from what the run has logged so far, and return its path.

    Reads metrics.jsonl, and config.yaml, rollouts.jsonl and summary.json where they are there.
    Raises FileNotFoundError: no metrics.jsonl; ValueError: it holds no step yet, or a line that is no JSON object.
    """
    run_dir = Path(run_dir)
    source = run_dir / "metrics.jsonl"
    if not source.exists():
        raise FileNotFoundError(
            f"{source} does not exist: name the folder of a run that has finished at least one step"
        )
    rows = read_rows(source)
    if not rows:
        raise ValueError(f"{source} holds no step yet: the report can be built once the first one is logged")
    config_text = _read(run_dir / "config.yaml")
    summary = json.loads(_read(run_dir / "summary.json") or "{}")
    rollouts = read_rows(run_dir / "rollouts.jsonl") if (run_dir / "rollouts.jsonl").exists() else []
    target = run_dir / "report.html"
    draft = target.with_suffix(".html.new")  # replaced in one move: a reader never meets half a page
    draft.write_text(
        _page(run_dir.name, rows, config_text, summary, rollouts), encoding="utf-8", errors="backslashreplace"
    )
    os.replace(draft, target)
    return target


def _page(folder: str, rows: list[dict], config_text: str, summary: dict, rollouts: list[dict]) -> str:
    config = yaml.safe_load(config_text) or {}
    name = _text(config.get("name") or folder)
    final = {key: value for key, value in summary.items() if key.startswith("eval/")}
    # Row N holds the held-out figures from before step N, so those of the finished run belong one step further.
    charted = [*rows, {"step": rows[-1]["step"] + 1, **final}]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{name} · run report</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{name}</h1>
<p>{_text(" · ".join(_setup(rows, config)))}</p>
</header>
<main>
<dl class="figures">{"".join(_figure(*item) for item in key_figures(charted))}</dl>
<section class="charts" aria-label="Charts">{"".join(_charts(charted))}</section>
<p class="note">A bold line over a faint one is the mean of up to {REACH} steps before and after each.</p>
{_examples(rollouts)}
{_configuration(config_text)}
</main>
</body>
</html>
"""


def _setup(rows: list[dict], config: dict) -> list[str]:
    """What the run is, in a line; a config without a key leaves its part out."""
    planned = config.get("trainer", {}).get("num_steps")
    rollout, parallel = config.get("rollout", {}), config.get("parallel", {})
    parts = [f"{rows[-1]['step']:,} of {planned:,} steps" if planned else f"steps: {rows[-1]['step']:,}"]
    if {"prompts_per_step", "responses_per_prompt"} <= rollout.keys():
        parts.append(f"{rollout['prompts_per_step']} prompts × {rollout['responses_per_prompt']} responses per step")
    if config.get("verifier"):
        parts.append(f"{config['verifier']} verifier")
    if config.get("exploration"):
        parts.append(" + ".join(config["exploration"]))
    parts += [" × ".join(f"{axis} {parallel[axis]}" for axis in ("tp", "pp", "dp") if axis in parallel)]
    return [part for part in parts if part]


def key_figures(rows: list[dict]) -> list[tuple[str, str, str]]:
    """(name, value, what it is over) of the figures that a reader asks for first, as far as the metrics are there."""
    figures = []
    ends = [("Reward", "reward/mean", ".3f", WINDOW), ("Entropy", "policy/entropy", ".3f", WINDOW)]
    held_out = sorted(
        {name for row in rows for name in row if name.startswith("eval/pass@")}, key=lambda name: int(name[10:])
    )
    ends += [(f"Held-out {name[5:]}", name, ".1%", 1) for name in held_out]
    for title, metric, form, window in ends:
        values = _values(rows, metric)
        if len(values) == 1:
            figures.append((title, f"{values[0]:{form}}", "measured once"))
        elif values:
            count = min(window, len(values) // 2)
            first, last = _mean(values[:count]), _mean(values[-count:])
            ratio = f", × {last / first:.2f}" if first > 0 else ""
            span = f"first and last {count} steps" if count > 1 else "first and last"
            figures.append((title, f"{first:{form}} → {last:{form}}", span + ratio))
    if share := _values(rows, "lp_reg/share"):
        figures.append(("Regularised tokens", f"{_mean(share):.2%}", "mean of all steps"))
    if gap := _values(rows, "rollout/log_prob_gap_max"):
        figures.append(("Log-prob gap", f"{max(gap):.1e}" if any(gap) else "0", "largest, policy against engine"))
    checks = [row["sync/verified"] for row in rows if "sync/verified" in row]
    if checks:
        figures.append(
            ("Weight sync", f"{sum(map(bool, checks)):,} of {len(checks):,}", "steps proven equal in the engine")
        )
    if times := _values(rows, "time/step"):
        pace = _values(rows, "tokens/per_second")
        speed = f", {_mean(pace):,.0f} tokens/s" if pace else ""
        figures.append(("Time", duration(sum(times)), f"{_mean(times):.2f} s per step{speed}"))
    return figures


def _figure(name: str, value: str, note: str) -> str:
    return f"<div><dt>{_text(name)}</dt><dd><strong>{_text(value)}</strong><span>{_text(note)}</span></dd></div>"


def _charts(rows: list[dict]) -> Iterable[str]:
    for chart in CHARTS:
        drawing = draw(chart, rows)
        if drawing:
            items = "".join(
                f'<li><i style="background:var({colour})"></i>{_text(label)}</li>' for label, colour in drawing.legend
            )
            legend = f"<ul>{items}</ul>" if items else ""
            caption = f"<h2>{_text(chart.title)}</h2><p>{_text(chart.note)}</p>{legend}"
            yield f"<figure><figcaption>{caption}</figcaption>{drawing.svg}</figure>\n"


def _examples(rollouts: list[dict]) -> str:
    """The newest right and wrong responses, side by side."""
    judged = [row for row in reversed(rollouts) if is_number(row.get("reward"))]
    right = [row for row in judged if row["reward"] > RIGHT_ABOVE][:EXAMPLES]
    wrong = [row for row in judged if row["reward"] <= RIGHT_ABOVE][:EXAMPLES]
    columns = "".join(
        f'<div><h3 class="{name}">{title}</h3>{"".join(map(_example, chosen))}</div>'
        for name, title, chosen in (("right", "Right", right), ("wrong", "Wrong", wrong))
        if chosen
    )
    return f'<section><h2>Latest responses</h2><div class="examples">{columns}</div></section>' if columns else ""


def _example(row: dict) -> str:
    tokens, reason = row.get("tokens", "?"), {"length": ", cut off"}.get(row.get("finish_reason", ""), "")
    head = (
        f"step {row['step']} · prompt {row.get('prompt_id', '?')} · reward {row['reward']:g} · {tokens} tokens{reason}"
    )
    parts = [("Prompt", row.get("prompt")), ("Response", row.get("response")), ("Read as", row.get("extracted"))]
    parts += [("Answer", row.get("answer"))]
    body = "".join(f"<dt>{name}</dt><dd>{_pre(value)}</dd>" for name, value in parts if value is not None)
    return f"<article><p>{_text(head)}</p><dl>{body}</dl></article>"


def _configuration(text: str) -> str:
    return f"<section><details><summary>Configuration</summary>{_pre(text)}</details></section>" if text else ""


def _pre(value: Any) -> str:
    """Text with its line breaks, cut at LONGEST; the keyboard stops only where it may have to scroll."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]} … {len(text) - LONGEST:,} more characters"
    stop = ' tabindex="0"' if len(text) > 400 or text.count("\n") > 9 else ""
    return f"<pre{stop}>{_text(shown)}</pre>"


# Control characters are not allowed in HTML: each shows as its own picture (␀, ␛), as far as Unicode has one.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}


def _text(value: Any) -> str:
    """Text made safe for HTML, inside an element or a quoted attribute."""
    return escape(str(value).translate(_VISIBLE), quote=True)


def _values(rows: list[dict], metric: str) -> list[float]:
    return [row[metric] for row in rows if is_number(row.get(metric))]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
