"""Multiple choice (GPQA, MMLU-Pro): one letter of A to J, in the last box or "Answer:" line."""

from __future__ import annotations

import re
from typing import Any

from megatron_rlvr.verdict import Verdict
from megatron_rlvr.verifiers.answer_forms import canonical
from megatron_rlvr.verifiers.answer_text import final_answer, read_gold

ISOLATED = False  # text alone

# B, (B), B., \text{(B)}, "B) 34 m/s", "option B"
_LETTER = re.compile(r"(?:the )?(?:option|choice)? ?\(?([A-J])\)?(?:[.):]\s*(?P<rest>.*))?", re.IGNORECASE | re.DOTALL)
# Behind it, a second letter that it might be as well: "or C", "this or maybe C", "not A", "and C", "this and C", "C)".
# Not so in "I and II", "not enough data", "because A and C are wrong".
_ANOTHER = re.compile(
    r"(?i:\bor|^and|^not)\b.*\b[A-J]\b|(?i:\band|\bnot)\b.*\b[A-J]\W*$|(?<![A-Za-z])\(?[A-J][.)](?![A-Za-z])", re.DOTALL
)


def read_answer(value: Any) -> str:
    """The gold letter. Raises ValueError where the value is no letter of A to J."""
    letter = _letter(read_gold(value))
    if not letter:
        raise ValueError(f"must be a letter from A to J, not {value!r}")
    return letter


def verify(response: str, answer: str) -> Verdict:
    """Reward 1 where the final letter is the gold one, else 0; unparseable where there is not exactly one letter."""
    text = final_answer(response)
    letter = _letter(text[:500])
    if not letter:
        return Verdict(0.0, "unparseable", extracted=text[:500], message="not one letter in a box or an 'Answer:' line")
    return Verdict(float(letter == answer), "ok", extracted=letter)


def _letter(text: str) -> str:
    bare = re.sub(r"\\text\{([^{}]*)\}", r"\1", canonical(text)).strip(" .*")
    match = _LETTER.fullmatch(bare)
    return match[1].upper() if match and not _ANOTHER.search(match["rest"] or "") else ""
