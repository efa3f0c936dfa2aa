"""Prompt data sets: rows of one or several sources -> token sequences with an answer, in an order that can be resumed.

prompts = load_prompts([SourceConfig("dapo_math_17k.parquet")], config.data, tokenizer, "math")
step_prompts = prompts.take(position=step * 32, n=32, seed=0, shuffle=True)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.config import ConfigError, DataConfig, SourceConfig, rule
from megatron_rlvr.prompt_files import read_rows, source_name, stem
from megatron_rlvr.prompt_order import Order
from megatron_rlvr.prompt_report import CONTRADICTION, REPEAT, Drop, Placed, notes, reasons, unusable, used
from megatron_rlvr.prompt_rows import RowError, RowReader, config_key
from megatron_rlvr.templates import CHAT
from megatron_rlvr.types import Prompt
from megatron_rlvr.verifiers import load

_CHUNK = 1000  # rows tokenised together: offsets and strings take ten times the memory of the ids


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts in the order of the sources; ``report`` says in lines what was read and what was dropped."""

    prompts: list[Prompt]
    drops: list[Drop]
    report: list[str]
    order: Order

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, position: int, n: int, seed: int, shuffle: bool) -> list[Prompt]:
        """Prompts ``position`` .. ``position + n - 1`` of the endless sequence of epochs.

        A pure function of its arguments: a resumed run and every rank see the same order. Each epoch holds each prompt
        as often as its source's weight says; n prompts that cross from one epoch into the next can hold one twice.
        """
        return [self.prompts[self.order.at(place, seed, shuffle)] for place in range(position, position + n)]

    def shared_with(self, other: PromptSet) -> int:
        """How many of these prompts are, token for token, among the other's too."""
        others = {prompt.token_ids for prompt in other.prompts}
        return sum(prompt.token_ids in others for prompt in self.prompts)

    def check_ids(self, vocab_size: int, model: str | Path) -> None:
        """Whether every token of the prompts is one of the model's. Raises ConfigError.

        Others would read the padding behind its embedding, which training changes and the engine never sees.
        """
        for prompt in self.prompts:
            largest = max(prompt.token_ids)
            rule(
                largest < vocab_size,
                f"{model}: prompt {prompt.id} holds token {largest}, but the model has {vocab_size} (vocab_size in its "
                f"config.json): its tokenizer has tokens that it lacks; resize the model, or take its own tokenizer",
            )


def load_prompts(
    sources: Sequence[SourceConfig],
    data: DataConfig,
    tokenizer: Any,
    verifier: str,
    key: Callable[[str], str] = config_key,
) -> PromptSet:
    """Read, render and tokenise every row of the sources (prompt_files.read_rows says what they can be).

    Rows without an answer or a prompt, with a prompt of more than ``data.max_prompt_length`` tokens, and unreadable
    ones are dropped and counted; so are, unless ``data.repeats`` keeps them, a question's later rows and every row of a
    question with contradicting answers. Raises ConfigError: a source that cannot be read, fields that cannot be found,
    an unknown verifier, a source without a usable row, and with ``data.strict`` the first row that cannot be used;
    ``key`` says how such an error names a field of ``data``.
    """
    rule(
        data.template not in CHAT or bool(getattr(tokenizer, "chat_template", None)),
        f"{key('template')}={data.template} needs a tokenizer with a chat template, and this one has none: set "
        f"{key('template')}=raw to use each prompt's text as it is, or r1_zero",
    )
    names = _names(sources)
    rows, drops = _read(sources, names, data, tokenizer, verifier, key)
    contradicting = _contradicting(rows)
    remarks = notes(rows, len(contradicting), data.repeats)
    if data.repeats == "drop":
        rows = _without_repeats(rows, contradicting, drops)
    parts = _fitting(rows, names, data, tokenizer, verifier, drops)
    if data.strict and (lost := unusable(drops)):
        raise ConfigError(f"{lost[0]}; mend it, or set {key('strict')}=false to drop such rows")
    order = Order.weighted([len(part) for part in parts], [source.weight for source in sources])
    shares = [count / len(order) for count in order.counts]
    report = [used(name, len(part), drops, share) for name, part, share in zip(names, parts, shares, strict=True)]
    report += [*reasons(drops), *remarks]
    for name, part in zip(names, parts, strict=True):
        rule(bool(part), f"no usable row in {name}: " + "; ".join(report))
    return PromptSet([prompt for part in parts for prompt in part], sorted(drops), report, order)


def _names(sources: Sequence[SourceConfig]) -> list[str]:
    """What reports call each source: its file name, or the whole path where two files have one name."""
    short = [source_name(source.path) for source in sources]
    return [name if short.count(name) == 1 else source.path for name, source in zip(short, sources, strict=True)]


def _read(
    sources: Sequence[SourceConfig],
    names: list[str],
    data: DataConfig,
    tokenizer: Any,
    verifier: str,
    key: Callable[[str], str],
) -> tuple[list[Placed], list[Drop]]:
    read_answer = load(verifier).read_answer
    rows, drops = [], []
    for part, (source, name) in enumerate(zip(sources, names, strict=True)):
        reader = RowReader(source, data, tokenizer, read_answer, key)
        for number, row in read_rows(source.path):
            try:
                rows.append(Placed(part, name, number, reader(row)))
            except RowError as error:
                drops.append(Drop(name, number, *error.args))
    return rows, drops


def _contradicting(rows: list[Placed]) -> dict[str, list[Placed]]:
    """Question -> its rows, where they do not agree on the answer."""
    by_question = defaultdict(list)
    for placed in rows:
        by_question[placed.row.question].append(placed)
    repeated = {question: same for question, same in by_question.items() if len(same) > 1}
    return {question: same for question, same in repeated.items() if len({row.answer_form for row in same}) > 1}


def _without_repeats(rows: list[Placed], contradicting: dict[str, list[Placed]], drops: list[Drop]) -> list[Placed]:
    """The first row of each question that has one answer; the others are added to ``drops``."""
    kept: dict[str, Placed] = {}
    for placed in rows:
        question = placed.row.question
        if question in contradicting:
            other = next(row for row in contradicting[question] if row.answer_form != placed.answer_form)
            detail = f"{placed.answer_text[:40]}, but {other.answer_text[:40]} in {other.source} row {other.number}"
            drops.append(placed.drop(CONTRADICTION, detail))
        elif question in kept:
            drops.append(placed.drop(REPEAT, f"{kept[question].source} row {kept[question].number}"))
        else:
            kept[question] = placed
    return list(kept.values())


def _fitting(
    rows: list[Placed], names: list[str], data: DataConfig, tokenizer: Any, verifier: str, drops: list[Drop]
) -> list[list[Prompt]]:
    """The prompts of each source that are short enough; the others are added to ``drops``."""
    stems = [stem(name) for name in names]  # a.json and a.jsonl have one
    prefixes = [short if stems.count(short) == 1 else name for short, name in zip(stems, names, strict=True)]
    parts: list[list[Prompt]] = [[] for _ in names]
    start = [] if data.template in CHAT else _first_token(tokenizer)  # a chat template writes it
    for placed, ids in zip(rows, _tokenise([placed.row.text for placed in rows], tokenizer), strict=True):
        if not placed.row.mark and ids[:1] != start:
            ids = start + ids
        if not ids:
            drops.append(placed.drop("no prompt", "no token of it is in the tokenizer's vocabulary"))
        elif len(ids) > data.max_prompt_length:
            reason = f"longer than data.max_prompt_length={data.max_prompt_length} tokens"
            drops.append(placed.drop(reason, f"{len(ids)} tokens"))
        else:
            name = f"{prefixes[placed.part]}/{placed.number}"
            parts[placed.part].append(Prompt(name, placed.row.text, tuple(ids), verifier, placed.row.answer))
    return parts


def _first_token(tokenizer: Any) -> list[int]:
    """The token that begins every text of the model by the tokenizer's own default: Llama's, which Qwen lacks."""
    token = getattr(tokenizer, "bos_token_id", None)
    return [token] if token is not None and tokenizer("")["input_ids"][:1] == [token] else []


def _tokenise(texts: list[str], tokenizer: Any) -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        ids += tokenizer(chunk, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return ids
