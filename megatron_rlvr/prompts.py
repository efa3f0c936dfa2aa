"""Prompt data sets: rows of a file -> token sequences with an answer, in an order that can be resumed.

prompts = load_prompts("dapo_math_17k.parquet", config.data, tokenizer, "math")
step_prompts = prompts.take(position=step * 32, n=32, seed=0, shuffle=True)
"""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_rlvr.config import ConfigError, DataConfig, rule
from megatron_rlvr.prompt_files import read_rows
from megatron_rlvr.templates import wrap
from megatron_rlvr.types import Prompt
from megatron_rlvr.verifiers import load

_PROMPT_FIELDS = ("prompt", "problem", "question")
_ANSWER_FIELDS = ("reward_model.ground_truth", "answer", "label")  # the first is how verl's files hold it
_CHUNK = 1000  # rows tokenised together: offsets and strings take ten times the memory of the ids
_NAMED = 3  # dropped rows that the report names, per reason


class Drop(NamedTuple):
    """A row that cannot be used: Drop(row=17, field="answer", reason="no answer", detail="")."""

    row: int  # counted from 1, as an editor counts lines
    field: str
    reason: str
    detail: str


class _Row(NamedTuple):
    number: int
    field: str  # that the prompt was in
    text: str
    answer: Any


class _RowError(Exception):
    """What is wrong with one row: (field, reason, detail)."""


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of one file, in file order; ``report`` says in lines what was read and what was dropped."""

    prompts: list[Prompt]
    drops: list[Drop]
    report: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, position: int, n: int, seed: int, shuffle: bool) -> list[Prompt]:
        """Prompts ``position`` .. ``position + n - 1`` of the endless sequence of epochs.

        A pure function of its arguments: a resumed run and every rank see the same order. Each epoch holds each prompt
        once; n prompts that cross from one epoch into the next can hold a prompt twice.
        """
        taken = []
        for place in range(position, position + n):
            epoch, index = divmod(place, len(self.prompts))
            taken.append(self.prompts[_order(len(self.prompts), seed, epoch)[index] if shuffle else index])
        return taken


@functools.lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> list[int]:
    """The permutation of one epoch."""
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def load_prompts(path: str | Path, data: DataConfig, tokenizer: Any, verifier: str) -> PromptSet:
    """Read, render and tokenise every row of ``path`` (.jsonl, .jsonl.gz, .json, .parquet, or an arrow folder).

    Rows without an answer or a prompt, with a prompt of more than ``data.max_prompt_length`` tokens, and unreadable
    ones are dropped and counted. Raises ConfigError: a file that cannot be read, fields that cannot be found, an
    unknown verifier, no usable row, and with ``data.strict`` the first row that would be dropped.
    """
    path = Path(path)
    rule(
        data.template in ("raw", "r1_zero") or bool(getattr(tokenizer, "chat_template", None)),
        f"data.template={data.template} needs a tokenizer with a chat template, and this one has none: set "
        f"data.template=raw to use each prompt's text as it is, or r1_zero",
    )
    rows, drops = _read(path, data, tokenizer, load(verifier).read_answer)
    prompts = []
    for row, ids in zip(rows, _tokenise(rows, tokenizer), strict=True):
        if len(ids) > data.max_prompt_length:
            reason = f"longer than data.max_prompt_length={data.max_prompt_length} tokens"
            drops.append(Drop(row.number, row.field, reason, f"{len(ids)} tokens"))
        else:
            prompts.append(
                Prompt(f"{path.name.split('.')[0]}/{row.number}", row.text, tuple(ids), verifier, row.answer)
            )
    drops.sort()
    report = _report(path, len(prompts), drops)
    if data.strict and drops:
        raise ConfigError(f"{_describe(path, drops[0])}; mend it, or set data.strict=false to drop such rows")
    rule(bool(prompts), f"no usable row in {path}: " + "; ".join(report))
    return PromptSet(prompts, drops, report)


def _tokenise(rows: list[_Row], tokenizer: Any) -> Iterator[list[int]]:
    for start in range(0, len(rows), _CHUNK):
        texts = [row.text for row in rows[start : start + _CHUNK]]
        yield from tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def _read(path: Path, data: DataConfig, tokenizer: Any, read_answer: Callable) -> tuple[list[_Row], list[Drop]]:
    fields: tuple[str, str] | None = None
    rows, drops = [], []
    for number, row in read_rows(path):
        try:
            if not isinstance(row, dict):
                raise _RowError("row", "unreadable", str(row)[:80] or "not an object with fields")
            fields = fields or _detect(row, data, path)
            text, answer = _render(row, fields[0], data, tokenizer), _answer(row, fields[1], read_answer)
            rows.append(_Row(number, fields[0], text, answer))
        except _RowError as error:
            drops.append(Drop(number, *error.args))
    return rows, drops


def _detect(row: dict[str, Any], data: DataConfig, path: Path) -> tuple[str, str]:
    """(prompt field, answer field), as configured or as the first row shows them."""
    found = []
    for key, named, known in (
        ("prompt_field", data.prompt_field, _PROMPT_FIELDS),
        ("answer_field", data.answer_field, _ANSWER_FIELDS),
    ):
        field = named or next((name for name in known if _get(row, name) is not _MISSING), "")
        rule(
            bool(field) and _get(row, field) is not _MISSING,
            f"the first row of {path} has no field {field or ' or '.join(known)}, but {', '.join(row)}: set data.{key}",
        )
        found.append(field)
    return found[0], found[1]


_MISSING = object()


def _get(row: Any, field: str) -> Any:
    """The value behind a dotted field name, or _MISSING."""
    for part in field.split("."):
        if not isinstance(row, dict) or part not in row:
            return _MISSING
        row = row[part]
    return row


def _render(row: dict[str, Any], field: str, data: DataConfig, tokenizer: Any) -> str:
    """The prompt's text, template applied. Of a list of messages only chat takes all, the others the last user's."""
    value = _get(row, field)
    if value is _MISSING or value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise _RowError(field, "no prompt", "")
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not all(
        isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
        for item in messages
    ):
        raise _RowError(field, "neither text nor a list of chat messages", repr(value)[:80])
    asked = [item["content"] for item in messages if item["role"] == "user"]
    if not asked or not asked[-1].strip():
        raise _RowError(field, "no prompt", "no user message")
    if data.template == "raw":
        return asked[-1]
    if data.template == "r1_zero":
        return wrap("r1_zero", asked[-1])
    if data.template == "dapo":
        messages = [{"role": "user", "content": wrap("dapo", asked[-1])}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _answer(row: dict[str, Any], field: str, read_answer: Any) -> Any:
    value = _get(row, field)
    if value is _MISSING or value is None or value == "":
        raise _RowError(field, "no answer", "")
    try:
        return read_answer(value)
    except ValueError as error:
        raise _RowError(field, "not an answer for this verifier", str(error)[:200]) from error


def _describe(path: Path, drop: Drop) -> str:
    return f"{path.name} row {drop.row}, {drop.field}: {drop.reason}" + (f" ({drop.detail})" if drop.detail else "")


def _report(path: Path, used: int, drops: list[Drop]) -> list[str]:
    lines = [f"{path.name}: {used} of {used + len(drops)} rows are prompts"]
    by_reason = defaultdict(list)
    for drop in drops:
        by_reason[drop.reason].append(drop)
    for reason, dropped in by_reason.items():
        first = "; ".join(_describe(path, drop) for drop in dropped[:_NAMED])
        lines.append(f"dropped {len(dropped)} rows ({reason}): {first}" + ("; ..." if len(dropped) > _NAMED else ""))
    return lines
