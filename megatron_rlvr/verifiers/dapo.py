"""DAPO's rule: what stands behind the last "Answer:" is, as text, the gold answer: +1, or -1 (arXiv 2503.14476, 3.4).

Both sides are first written in one way: LaTeX spelling, spaces, units, 025 and 25.0 for 25. Unlike the released code
this takes no right-hand side for the answer: there "Answer: 1 = 7" is as good as 7.
"""

from __future__ import annotations

import re

from megatron_rlvr.verdict import Verdict
from megatron_rlvr.verifiers import answer_forms as forms
from megatron_rlvr.verifiers.answer_text import read_gold, strip_marks

ISOLATED = False  # text alone
read_answer = read_gold

_TAIL = 300  # characters that are looked at, as in the released code
_ANSWER = re.compile(r"answer\s*[:：]\s*([^\n]+)", re.IGNORECASE)


def verify(response: str, answer: str) -> Verdict:
    """Reward +1 or -1; unparseable, and -1, where the last 300 characters hold no "Answer:"."""
    lines = _ANSWER.findall(response[-_TAIL:])
    if not lines:
        return Verdict(-1.0, "unparseable", message="no 'Answer:' in the last 300 characters")
    text = strip_marks(lines[-1])
    return Verdict(1.0 if _normal(text) == _normal(answer) else -1.0, "ok", extracted=text)


def _normal(text: str) -> str:
    value = forms.split_unit(forms.canonical(text))[0]
    exact = forms.number(value)
    return str(exact) if exact is not None else forms.squeeze(value)
