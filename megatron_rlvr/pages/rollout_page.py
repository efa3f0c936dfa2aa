"""RUN/tokens/step_N.html: a step's responses, token by token, coloured by whatever the flight recorder kept of them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rlvr.metrics import row_is_right
from megatron_rlvr.pages import page
from megatron_rlvr.pages.report_style import STYLE
from megatron_rlvr.pages.rollout_script import ROLLOUT_STYLE, SCRIPT
from megatron_rlvr.token_records import TokenRecord, page_path, read_record

# (name in the words of the page, what it is, how it is coloured): low marks small values, high large ones, sign both
# ways from 0, ratio both ways from 1, off what is false.
COLUMNS = {
    "log_prob": ("log-prob", "of the policy that trained, nats", "low"),
    "rollout_log_prob": ("rollout log-prob", "of the engine that sampled, nats", "low"),
    "log_prob_gap": ("log-prob gap", "|train - rollout|, nats", "high"),
    "entropy": ("entropy", "of the policy before the token, nats", "high"),
    "rank": ("rank", "1: the most probable token", "high"),
    "kept": ("kept", "above the threshold in the old policy; no: filtered", "off"),
    "kept_mass": ("kept mass", "probability of all tokens that the old policy keeps", "low"),
    "ratio": ("ratio", "p / old p when the token was trained on", "ratio"),
    "clipped": ("clipped", "the loss's clip acts on it", "high"),
    "advantage": ("advantage", "as the loss takes it", "sign"),
    "value": ("value", "mean of the critic's heads", "sign"),
    "value_std": ("value spread", "standard deviation over the critic's heads", "high"),
    "lp_reg/selected": ("selected by Lp-Reg", "regularised token", "high"),
    "lp_reg/proxy_log_prob": ("proxy log-prob", "ln q of Lp-Reg; -inf where filtered", "low"),
    "cde/bonus": ("perplexity bonus", "CDE's, of the whole response", "high"),
    "cde/critic_bonus": ("critic bonus", "CDE's, of the token", "high"),
}
META = ["prompt_id", "prompt", "sample", "tokens", "reward", "right", "status", "extracted", "answer"]
META += ["finish_reason", "start", "stop"]


def build_rollout_page(run_dir: str | Path, step: int) -> Path:
    """Write RUN/tokens/step_N.html from step_N.safetensors and return its path.

    Raises FileNotFoundError and ValueError as token_records.read_record.
    """
    run_dir = Path(run_dir)
    record = read_record(run_dir, step)
    title = f"{run_dir.resolve().name} · step {step} · tokens"
    return page.write(
        page_path(run_dir, step), page.document(title, _body(title, record), STYLE + ROLLOUT_STYLE, SCRIPT)
    )


def _body(title: str, record: TokenRecord) -> str:
    return f"""<header>
<h1>{page.text(title)}</h1>
<p>{len(record.responses)} responses, {len(record.texts):,} tokens. Every number is the one that the step computed with;
of a response that no verifier could judge there is none. Point at a token, or focus a response and use the arrow keys,
to read all of them.</p>
</header>
<main>
<noscript><p class="note">This page colours its tokens with a script of its own; it loads nothing.</p></noscript>
<form id="controls" aria-label="What to show"></form>
<p id="legend" class="note" aria-live="polite"></p>
<section id="token" aria-live="polite" aria-label="The token"></section>
<section id="responses" aria-label="Responses"></section>
<details id="scatter"><summary>All tokens by probability and entropy</summary></details>
</main>
{page.data("record", _packed(record))}"""


def _packed(record: TokenRecord) -> dict[str, Any]:
    """The record for the script: texts once each, numbers as base64 of fp32, flags as base64 of bytes."""
    texts = list(dict.fromkeys(record.texts))
    places = {text: place for place, text in enumerate(texts)}
    columns = dict(record.columns)
    if {"log_prob", "rollout_log_prob"} <= columns.keys():
        columns["log_prob_gap"] = (columns["log_prob"] - columns["rollout_log_prob"]).abs()
    named = [name for name in COLUMNS if name in columns] + [name for name in columns if name not in COLUMNS]
    responses = [{name: row.get(name) for name in META} for row in record.responses]
    for row in responses:
        row["right"] = row_is_right(row)
        row |= {name: page.visible(row[name]) for name in ("prompt", "extracted") if row[name] is not None}
        row["answer"] = page.visible(page.plain(row["answer"]))
    return {
        "texts": [page.visible(text) for text in texts],
        "tokens": _base64(np.array([places[text] for text in record.texts], dtype=np.float32)),
        "columns": [_column(name, columns[name], record.judged()) for name in named],
        "responses": responses,
    }


def _column(name: str, values: torch.Tensor, judged: torch.Tensor) -> dict[str, Any]:
    """Values [n] for the script; NaN, and 2 for a flag, at tokens that nothing was computed of."""
    label, note, kind = COLUMNS.get(name, (name, "kept by the exploration method", "high"))
    is_flag = values.dtype == torch.bool
    numbers = np.where(judged.numpy(), values.numpy(), 2 if is_flag else np.nan)
    return {
        "name": name,
        "label": label,
        "note": note,
        "kind": kind,
        "flag": is_flag,
        "values": _base64(numbers.astype(np.uint8 if is_flag else np.float32)),
    }


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()
