"""GSM8K: the number behind the last "####", or in the last box or "Answer:" line, is the gold one.

"#### Verification", "#### Step 2" and "#### 2. Result" are headings of Markdown and no answers. A box behind the last
number counts, and not that number: "#### 2 Result" may be a heading too.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_rlvr.verdict import Verdict
from megatron_rlvr.verifiers import answer_forms as forms
from megatron_rlvr.verifiers.answer_text import after_thinking, final_answer, last_boxes, read_gold, strip_marks

ISOLATED = False  # text alone

_MARKED = re.compile(r"####([^\n]*)")
_WORDS = re.compile(r"[ *_]*[^\W\d_]")  # begins with a letter
_ITEM = re.compile(r"[ *_]*[0-9]+[.)](?=[ *_]*[^\W\d_])")  # the number of a list, in front of words


def read_answer(value: Any) -> str:
    """The gold number, as text; a solution keeps it behind "####". Raises ValueError where there is none."""
    text = read_gold(value)
    if _number(text) is None:
        raise ValueError(f"is no number: {text[:80]!r}")
    return text


def verify(response: str, answer: str) -> Verdict:
    """Reward 1 where the final number equals the gold one, else 0; unparseable where there is no final number."""
    text = _marked_answer(after_thinking(response)) or final_answer(response)
    given = _number(text[:200])
    if given is None:
        return Verdict(
            0.0, "unparseable", extracted=text[:200], message="no number behind ####, in a box or an 'Answer:'"
        )
    return Verdict(float(given == _number(answer)), "ok", extracted=text)


def _marked_answer(text: str) -> str:
    """What the last "####" says that is no heading; "" where there is none, or a box behind it."""
    for match in reversed(list(_MARKED.finditer(text))):
        said = _ITEM.sub("", match[1], count=1)
        if re.search("[0-9]", said):
            is_heading = bool(_WORDS.match(said)) or bool(last_boxes(text[match.end() :]))
            return "" if is_heading else strip_marks(match[1])
    return ""


def _number(text: str) -> Any:
    return forms.number(forms.split_unit(forms.canonical(text))[0])
