"""A weighted sum of verifiers: 0.9*math + 0.1*format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any

from megatron_rlvr.config import ConfigError
from megatron_rlvr.verdict import Verdict, is_right, is_scored

if TYPE_CHECKING:
    from megatron_rlvr.verifiers import Verifier

_TERM = re.compile(r"(?:^|\+)\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e-?[0-9]+)?)\s*\*\s*", re.IGNORECASE)


def terms(text: str) -> list[tuple[float, str]]:
    """[(0.9, "math"), (0.1, "format")]; empty where the text is no sum. Raises ConfigError for a weight of 0."""
    before, *rest = _TERM.split(text.strip())
    if before or not rest:
        return []
    found = [(float(weight), name.strip()) for weight, name in zip(rest[::2], rest[1::2], strict=True)]
    for weight, name in found:
        if not (weight > 0 and isfinite(weight)):
            raise ConfigError(f"verifier={text!r}: the weight of {name} must be above 0, not {weight:g}: leave it out")
    return found


class Combination:
    """Reward is the weighted sum; whatever else is the first verifier's, unless another one failed.

    So the first one says what is right: no weighted sum does, for it may pay a wrong answer's form with more than 1/2.
    """

    def __init__(self, weighted: Sequence[tuple[float, Verifier]]) -> None:
        self.weights = [weight for weight, _ in weighted]
        self.parts = [part for _, part in weighted]
        self.ISOLATED = any(part.ISOLATED for part in self.parts)

    def read_answer(self, value: Any) -> list[Any]:
        """The row's answer as each of the verifiers wants it."""
        return [part.read_answer(value) for part in self.parts]

    def verify(self, response: str, answer: list[Any]) -> Verdict:
        """A part that has no reward, by error or timeout, leaves the sum without one."""
        verdicts = [part.verify(response, one) for part, one in zip(self.parts, answer, strict=True)]
        failed = [verdict for verdict in verdicts if not is_scored(verdict)]
        first = (failed or verdicts)[0]
        reward = sum(weight * item.reward for weight, item in zip(self.weights, verdicts, strict=True))
        return replace(first, reward=0.0 if failed else reward, right=is_right(first))
