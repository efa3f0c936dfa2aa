r"""Where the final answer of a response is: shared by the verifiers that read one. All in linear time.

final_answer(r"<think>\boxed{1}</think> So it is \boxed{2}.") -> "2"
"""

from __future__ import annotations

import ast
import re
from typing import Any

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_ANSWER_LINE = re.compile(
    r"^[^\w\n]*(?:final )?answer[^\w\n]*?[:：](?:[ \t*]*\n\s*)?(.+)$", re.IGNORECASE | re.MULTILINE
)
# <|im_end|>, <｜end▁of▁sentence｜>, </s>, <eos>: a trailing token of the tokenizer is no part of an answer
_END_TOKEN = re.compile(r"(?:<[|｜][^<>|｜\n]{1,40}[|｜]>|</s>|<eos>|<end_of_turn>)$")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}"))
_JOINS = re.compile(r"[\s$*,;.]*(?:\b(?:or|and)\b|[,;]|\\(?:text|quad)\{?\s*(?:or|and)\s*\}?)[\s$*]*", re.IGNORECASE)
_DENIES = re.compile(
    r"(?:\bnot|\bcannot|\bnever|n't|\\neq?|≠|\\neg|\\lnot|¬)(?:\s+(?:be|equal(?: to)?))?[\s$*:(\\]*$", re.IGNORECASE
)


def after_thinking(response: str) -> str:
    """What follows the thought; a thought that never ends is followed by nothing."""
    return response.rpartition("</think>")[2].partition("<think>")[0]


def final_answer(response: str) -> str:
    r"""The last box after the thinking, else the last <answer> tag, else the last "Answer:" line; "" for none.

    A thought that never ends, a box that never closes and a box behind "not" hold no final answer. Boxes joined by
    "or", "and" or a comma are one answer with several parts.
    """
    text = after_thinking(response)
    if _BOX.search(text):
        return strip_marks(last_boxes(text))
    tagged = last_tag(text)
    lines = _ANSWER_LINE.findall(tagged or text)
    return strip_marks(lines[-1] if lines else tagged)


def last_tag(text: str) -> str:
    """What the last whole <answer> tag holds; "" where there is none."""
    before, closing, _ = text.rpartition("</answer>")
    _, opening, inside = before.rpartition("<answer>")
    return inside if opening and closing else ""


def last_boxes(text: str) -> str:
    """What the last box holds, with those joined to it in front, comma between; "" where there is none to take."""
    boxes: list[tuple[int, str, int]] = []
    for match in list(_BOX.finditer(text))[-20:]:
        if not boxes or match.start() >= boxes[-1][2]:  # one inside the last is a part of it: \boxed{7 or \boxed{6}}
            boxes.append((match.start(), *_inside(text, match.end())))
    first = len(boxes) - 1
    if not boxes or not boxes[-1][2]:
        return ""
    while first and boxes[first - 1][2] and _is_join(text[boxes[first - 1][2] : boxes[first][0]]):
        first -= 1
    start = boxes[first][0]
    return "" if _DENIES.search(text[max(0, start - 40) : start]) else ", ".join(box[1] for box in boxes[first:])


def _is_join(between: str) -> bool:
    return len(between) < 40 and bool(_JOINS.fullmatch(between))


def _inside(text: str, start: int) -> tuple[str, int]:
    """(what the braces opened before ``start`` hold, where they end); ("", 0) where they never close."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)  # \{ and \} are characters of the answer
        if depth == 0:
            return text[start : start + brace.start()], start + brace.end()
    return "", 0


def strip_marks(text: str) -> str:
    """Without what only sets the answer off: bold, $...$, a box around all of it, a full stop, an end-of-text token."""
    text = text.rstrip()
    for _ in range(4):  # of the end only: a pattern that may start anywhere takes quadratic time on a long text
        text = text[:-60] + _END_TOKEN.sub("", text[-60:]).rstrip()
    text = text.strip("* \t\r\n").removesuffix(".").rstrip()
    for left, right in _WRAPPERS:
        inside = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right) and left not in inside:
            text = inside.strip()
    return text.removesuffix(".").rstrip()


def read_gold(value: Any) -> str:
    """A data row's answer as text: a number, or text that may hide it in a box or behind GSM8K's ``####``.

    A list that came as text, as in Skywork-OR1's rows, must hold one answer. Raises ValueError: neither text nor a
    number, or nothing in it.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"must be text or a number, not {value!r}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.lstrip()[:2] in ('["', "['"):
        value = _only_one(value)
    text = str(value).rpartition("####")[2]
    text = strip_marks(last_boxes(text) or text)
    if not text:
        raise ValueError("is empty")
    return text


def _only_one(text: str) -> str:
    try:
        items = ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):  # no list after all
        return text
    if not isinstance(items, list) or len(items) != 1 or not isinstance(items[0], str):
        raise ValueError(f"is a list of {len(items)}, and a row has one answer: {text[:80]}")
    return items[0]
