"""GSM8K: the number behind the last "####", or in the last box or "Answer:" line, is the gold one.

"#### Step 2" is a heading of Markdown and no answer; one behind the answer does not hide the box.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_rlvr.verdict import Verdict
from megatron_rlvr.verifiers import answer_forms as forms
from megatron_rlvr.verifiers.answer_text import after_thinking, final_answer, read_gold, strip_marks

ISOLATED = False  # text alone

_MARKED = re.compile(r"####([^\n]*)")
_HEADING = re.compile(r"[ *_]*(?:$|[^\W\d_])")  # nothing, or a letter


def read_answer(value: Any) -> str:
    """The gold number, as text; a solution keeps it behind "####". Raises ValueError where there is none."""
    text = read_gold(value)
    if _number(text) is None:
        raise ValueError(f"is no number: {text[:80]!r}")
    return text


def verify(response: str, answer: str) -> Verdict:
    """Reward 1 where the final number equals the gold one, else 0; unparseable where there is no final number."""
    marked = _MARKED.findall(after_thinking(response))[-1:]
    text = final_answer(response) if not marked or _HEADING.match(marked[0]) else strip_marks(marked[0])
    given = _number(text[:200])
    if given is None:
        return Verdict(
            0.0, "unparseable", extracted=text[:200], message="no number behind ####, in a box or an 'Answer:'"
        )
    return Verdict(float(given == _number(answer)), "ok", extracted=text)


def _number(text: str) -> Any:
    return forms.number(forms.split_unit(forms.canonical(text))[0])
