"""One row of a data set -> its question, its prompt text and its answer, whatever the row's layout.

RowReader(SourceConfig("gsm8k.jsonl"), data, tokenizer, read_answer)({"question": "1+1?", "answer": "#### 2"})
-> Row(field="question", question="1+1?", text="<user>1+1?<bot>", answer="2", mark="")
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from jinja2 import TemplateError

from megatron_rlvr.config import ConfigError, DataConfig, SourceConfig, rule
from megatron_rlvr.seeds import stable_seed
from megatron_rlvr.templates import INSIDE_CHAT, R1_ZERO, turn_mark, unwrap, wrap

_PROMPT_FIELDS = ("prompt", "problem", "question", "Question")
_TESTS = ("test", "test_list")  # HumanEval's and MBPP's columns; without entry_point or test_imports they test nothing
# The first is how verl's files hold it; a solution comes last, for rows that have both hold the answer apart.
_ANSWER_FIELDS = (
    "reward_model.ground_truth", "answer", "expected_answer", "final_answer", "label", *_TESTS, "solution",
)  # fmt: skip
_SEEN = ("image", "images", "video", "videos")
_GPQA = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_INTEGER = re.compile(r"([-+]?)0*([0-9]+)(?:\.0*)?")
_BOX = re.compile(r"\\(?:boxed|fbox)\b")
_MISSING = object()
# Llama 3's chat templates write a day into the system message: today, where nobody says another one. Then a run that is
# resumed, or an evaluation that goes on, would have other prompts tomorrow. This is the day that they fall back to.
_DATE = "26 Jul 2024"


class Row(NamedTuple):
    """What one row holds."""

    field: str  # that the prompt was in
    question: str  # without any template: what makes two rows the same
    text: str  # the prompt, template applied
    answer: Any
    mark: str  # of a chat template that the prompt came in; such a prompt is used as it is


class RowError(Exception):
    """What is wrong with one row: (field, reason, detail)."""


def config_key(name: str) -> str:
    """What the user of a config sets for prompt_field, answer_field, template, ...; tools name their flags instead."""
    return f"data.{name}"


class RowReader:
    """Reads the rows of one source; the first row decides which fields hold prompt and answer.

    ``key`` says what errors call a field's name in the config.
    """

    def __init__(
        self,
        source: SourceConfig,
        data: DataConfig,
        tokenizer: Any,
        read_answer: Callable,
        key: Callable[[str], str] = config_key,
    ) -> None:
        self.source, self.data, self.tokenizer, self.read_answer, self.key = source, data, tokenizer, read_answer, key
        self.fields: tuple[str, str] | None = None

    def __call__(self, row: Any) -> Row:
        """Raises RowError for a row that cannot be used, ConfigError for a first row without the fields."""
        if not isinstance(row, dict):
            raise RowError("row", "unreadable", str(row)[:80] or "not an object with fields")
        if all(isinstance(row.get(field), str) for field in _GPQA):
            row = _multiple_choice(row)
        if isinstance(row.get("text"), str) and "test_list" in row and "prompt" not in row:
            row = _whole_mbpp(row)
        self.fields = self.fields or (
            find_field(row, self.source, "prompt_field", self.data.prompt_field, self.key("prompt_field")),
            find_field(row, self.source, "answer_field", self.data.answer_field, self.key("answer_field")),
        )
        prompt_field, answer_field = self.fields
        if answer_field in _TESTS and not (self.source.prompt_field or self.data.prompt_field):
            row = _with_tests(row, prompt_field)
        for field in _SEEN:
            if row.get(field) not in (None, [], "", {}):
                raise RowError(field, "asks about a picture", "the policy reads text alone")
        messages = _messages(row, prompt_field)
        if messages[-1]["role"] != "user":
            raise RowError(prompt_field, "ends with a message that is not the user's", "it may hold the answer")
        asked = _asked(messages)
        answer, mark = _answer(row, answer_field, self.read_answer), turn_mark(asked)
        text = asked if mark else self._render(messages, asked)
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write half of an emoji, which no tokenizer takes
            raise RowError(prompt_field, "unreadable", str(error)) from error
        said = [item["content"].strip() for item in messages if item["content"] is not asked]
        return Row(prompt_field, "\n".join([*said, unwrap(asked.strip()).strip()]), text, answer, mark)

    def _render(self, messages: list[dict[str, str]], asked: str) -> str:
        """Template applied. Of a list of messages only chat takes all, the others the last user's."""
        template = self.data.template
        if template == "raw":
            return asked
        if template == "r1_zero":
            return wrap("r1_zero", asked)
        if template in INSIDE_CHAT:
            messages = [{"role": "user", "content": wrap(template, asked)}]
        elif asked.startswith(R1_ZERO.partition("{prompt}")[0]):  # a whole prompt, which chat must not wrap again
            messages = [{"role": "user", "content": unwrap(asked)}]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, date_string=_DATE
            )
        except TemplateError as error:
            raise RowError(self.fields[0] if self.fields else "", "refused by the chat template", str(error)) from error


def find_field(row: dict[str, Any], source: SourceConfig, kind: str, default: str, key: str) -> str:
    """The field named by the source, else ``default``, else the one that this row shows.

    Raises ConfigError where the row has none: ``key`` is what to set then. ``kind`` is prompt_field or answer_field.
    """
    known = _PROMPT_FIELDS if kind == "prompt_field" else _ANSWER_FIELDS
    named = getattr(source, kind) or default
    field = named or next((name for name in known if _get(row, name) is not _MISSING), "")
    rule(
        bool(field) and _get(row, field) is not _MISSING,
        f"the first row of {source.path} has no field {field or ' or '.join(known)}, but {', '.join(row)}: set {key}",
    )
    return field


def read_question(row: dict[str, Any], field: str) -> str:
    """What the row asks, without any template. Raises RowError."""
    return unwrap(_asked(_messages(row, field)).strip()).strip()


def _asked(messages: list[dict[str, str]]) -> str:
    return next(item["content"] for item in reversed(messages) if item["role"] == "user")


def _get(row: Any, field: str) -> Any:
    """The value behind a dotted field name, or _MISSING."""
    for part in field.split("."):
        if not isinstance(row, dict) or part not in row:
            return _MISSING
        row = row[part]
    return row


def _messages(row: dict[str, Any], field: str) -> list[dict[str, str]]:
    """The prompt as chat messages, the last user's of which asks something."""
    value = _get(row, field)
    if value is _MISSING or value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise RowError(field, "no prompt", "")
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not all(
        isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
        for item in messages
    ):
        raise RowError(field, "neither text nor a list of chat messages", repr(value)[:80])
    asked = [item["content"] for item in messages if item["role"] == "user"]
    if not asked or not asked[-1].strip():
        raise RowError(field, "no prompt", "no user message")
    return messages


def _answer(row: dict[str, Any], field: str, read_answer: Callable) -> Any:
    value = row if field in _TESTS else _get(row, field)
    if isinstance(value, list) and len(value) == 1:  # OlympiadBench's final_answer
        value = value[0]
    # NaN is a float column's null, infinity what JSON's 1e400 becomes
    if value is _MISSING or value is None or value == "" or value != value or value in (math.inf, -math.inf):
        raise RowError(field, "no answer", "")
    if field.rpartition(".")[2] == "solution" and not (isinstance(value, str) and _BOX.search(value)):
        raise RowError(field, "no answer", r"a solution without \boxed")
    try:
        answer = read_answer(plain(value))
    except ValueError as error:
        raise RowError(field, "not an answer for this verifier", str(error)[:200]) from error
    except Exception as error:  # one of the user's own
        raise ConfigError(
            f"the verifier's read_answer({value!r:.80}) failed with {type(error).__name__}: {error}; it must raise "
            f"ValueError for an answer that it cannot take"
        ) from error
    try:
        json.dumps(answer)
    except (TypeError, ValueError) as error:  # the verifier's own fault, not the row's
        raise ConfigError(
            f"the verifier's read_answer returned {answer!r:.80}, which is not JSON ({error}): it must return text, "
            f"numbers, lists or dicts"
        ) from error
    return answer


def plain(value: Any) -> Any:
    """An integer as plain text, whatever the file made of it (27.0, "025", "27.0"); anything else as it is."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str) and (found := _INTEGER.fullmatch(value.strip())):
        return found[1].replace("+", "") * (found[2] != "0") + found[2]
    return value


def _with_tests(row: dict[str, Any], field: str) -> dict[str, Any]:
    """MBPP's row with its tests behind the task, in the words of MBPP's own prompt (arXiv 2108.07732).

    They call a function by a name that the task alone rarely says. Other rows stay as they are.
    """
    task, tests = _get(row, field), row.get("test_list")
    if not isinstance(task, str) or not isinstance(tests, list) or row.get("entry_point") or turn_mark(task):
        return row
    if not tests or not all(isinstance(test, str) and test.strip() not in task for test in tests):
        return row
    return row | {field: "\n".join([task.strip(), "Your code should pass these tests:", "", *tests])}


def _whole_mbpp(row: dict[str, Any]) -> dict[str, Any]:
    """A row of all of MBPP, in the words of its sanitised part."""
    setup = row.get("test_setup_code")
    return row | {"prompt": row["text"]} | ({"test_imports": [setup]} if setup else {})


def _multiple_choice(row: dict[str, Any]) -> dict[str, Any]:
    """GPQA's row -> a question that lists four answers, in an order drawn from the question, and the right letter."""
    choices = [row[field].strip() for field in _GPQA[1:]]
    order = list(range(4))
    random.Random(stable_seed("choices", row["Question"])).shuffle(order)
    lines = [f"{letter}) {choices[index]}" for letter, index in zip("ABCD", order, strict=True)]
    question = "\n".join(["Answer the following multiple choice question.", "", row["Question"].strip(), "", *lines])
    return {"question": question, "answer": "ABCD"[order.index(0)]}
