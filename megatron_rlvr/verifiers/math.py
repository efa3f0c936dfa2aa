"""Mathematics: one final answer, compared exactly where both sides are numbers, else by math-verify.

The text of a response only ever meets math-verify's LaTeX grammar. Its plain-expression extraction is left out,
because that one hands the text to sympy's parser, which evaluates Python.
"""

from __future__ import annotations

import functools
import logging
import re
from fractions import Fraction
from typing import Any

from math_verify import LatexExtractionConfig
from math_verify import parse as parse_latex
from math_verify import verify as equivalent

from megatron_rlvr.verdict import Verdict

ISOLATED = True  # sympy may take forever on a short expression

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off; the pool has one

_LONGEST = 1000  # characters; the gold answers of the common benchmarks stay under 210
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER_LINE = re.compile(r"^[^\w\n]*(?:final )?answer[^\w\n]*?[:：](.+)$", re.IGNORECASE | re.MULTILINE)
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad(?![a-z])|~")
_THOUSANDS_GAP = re.compile(r"(?<=[0-9])(?:\\[,;: ]|~|\s)(?=[0-9]{3}(?![0-9]))")
_NUMBER = re.compile(r"[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")
_SCIENTIFIC = re.compile(r"^([-+]?[0-9.]+)[eE]([-+]?[0-9]+)$")
_TWO_NUMBERS = re.compile(r"(?<![_^])(?<!frac |inom )[0-9]\s+[0-9]")


def read_answer(value: Any) -> str:
    """The gold answer as text: a number, or text that may hide it in a box or behind GSM8K's ``####``."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"must be text or a number, not {value!r}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).rpartition("####")[2]
    text = _strip(_last_box(text) or text)
    if not text:
        raise ValueError("is empty")
    return text


def verify(response: str, answer: str) -> Verdict:
    """Reward 1 where the final answer equals the gold one, else 0; unparseable where there is no readable answer."""
    text = final_answer(response)
    if not text:
        return Verdict(0.0, "unparseable", message=r"no closed \boxed{} and no 'Answer:' line after the thinking")
    problem = _refusal(text)
    if problem:
        return Verdict(0.0, "unparseable", extracted=text[:_LONGEST], message=problem)
    if text == answer:
        return Verdict(1.0, "ok", extracted=text)
    gold, given = _number(answer), _number(text)
    if gold is not None and given is not None and (gold == given or gold.denominator == 1):
        return Verdict(float(gold == given), "ok", extracted=text)
    parsed = _parse(text)
    if not parsed:
        return Verdict(0.0, "unparseable", extracted=text, message="not a mathematical expression")
    if not _parse(answer):
        raise ValueError(f"math-verify cannot read the gold answer {answer!r}")
    right = equivalent(_parse(answer), parsed, timeout_seconds=None, raise_on_error=True)
    return Verdict(float(right), "ok", extracted=text)


def final_answer(response: str) -> str:
    r"""The last box after the thinking, else the last "Answer:" line; "" where there is none.

    A thought that never ends, and a box that never closes, hold no final answer.
    """
    text = response.rpartition("</think>")[2].partition("<think>")[0]
    if _BOX.search(text):
        return _strip(_last_box(text))
    lines = _ANSWER_LINE.findall(text)
    return _strip(lines[-1]) if lines else ""


def _last_box(text: str) -> str:
    """What the last box holds, braces balanced; "" where there is none or it never closes."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return ""
    start, depth = boxes[-1].end(), 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)  # \{ and \} are characters of the answer
        if depth == 0:
            return text[start : start + brace.start()]
    return ""


def _strip(text: str) -> str:
    """Without the marks that only set the answer off: bold, $...$, a full stop."""
    text = text.strip().strip("*").strip().removesuffix(".").rstrip()
    for left, right in _WRAPPERS:
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            text = text[len(left) : -len(right)].strip()
    return text.removesuffix(".").rstrip()


def _refusal(text: str) -> str:
    """Why a final answer is not handed on, or ""."""
    if len(text) > _LONGEST:
        return f"an answer of {len(text)} characters, more than {_LONGEST}"
    if not _balanced(text):
        return "braces that do not match"  # they could close the box that _parse puts around the text
    if _number(text) is None and _TWO_NUMBERS.search(_SPACING.sub(" ", text)):
        return "two numbers side by side"  # math-verify reads 35 34 as a sum, 1 1/2 as a product
    return ""


def _balanced(text: str) -> bool:
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0


def _number(text: str) -> Fraction | None:
    """The exact value of a plain number (025, 70.0, 12,000, 12{,}000, 4.4e7), else None."""
    plain = _THOUSANDS_GAP.sub("", text.replace("{,}", ",").replace(r"\!", ""))
    return Fraction(plain.replace(",", "")) if _NUMBER.fullmatch(plain) else None


@functools.lru_cache(maxsize=1024)  # the G responses to a prompt share its gold answer, and often their own
def _parse(text: str) -> list:
    """sympy expressions by math-verify's LaTeX grammar; empty where it cannot read the text."""
    latex = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    return parse_latex(rf"\boxed{{{latex}}}", config, "no_fallback", parsing_timeout=None, raise_on_error=True)
