"""Countdown: reach the target with + - * and every number exactly once, without parentheses.

answer = {"numbers": [3, 5, 7], "target": 38}; the response ``5*7+3`` is right, ``38`` and ``7*5+3+0`` are not.
"""

from __future__ import annotations

import math
import re
from typing import Any

from megatron_rlvr.verdict import Verdict

ISOLATED = False  # pure and linear in the response: needs neither a process nor a deadline

_EXPRESSION = re.compile(r"[0-9]{1,9}(?:[-+*][0-9]{1,9})*")
_TERM = re.compile(r"([-+]?)([0-9*]+)")


def read_answer(value: Any) -> dict[str, Any]:
    """{"numbers": [int], "target": int}, checked."""
    if not isinstance(value, dict) or set(value) != {"numbers", "target"}:
        raise ValueError(f'must be {{"numbers": [...], "target": ...}}, not {value!r}')
    numbers, target = value["numbers"], value["target"]
    if not isinstance(numbers, list) or not numbers or not all(type(item) is int for item in [*numbers, target]):
        raise ValueError(f"numbers must be a list of integers and target an integer, not {value!r}")
    return {"numbers": numbers, "target": target}


def verify(response: str, answer: dict[str, Any]) -> Verdict:
    """Reward 1 where the response is an expression over exactly these numbers that equals the target, else 0."""
    text = response.strip()
    if not _EXPRESSION.fullmatch(text):
        return Verdict(0.0, "unparseable", message="not an expression of numbers joined by + - *")
    used = sorted(int(number) for number in re.findall(r"[0-9]+", text))
    right = used == sorted(answer["numbers"]) and _value(text) == answer["target"]
    return Verdict(float(right), "ok", extracted=text)


def _value(text: str) -> int:
    """The value of a checked expression: a signed sum of products."""
    total = 0
    for sign, product in _TERM.findall(text):
        value = math.prod(int(factor) for factor in product.split("*"))
        total += -value if sign == "-" else value
    return total
