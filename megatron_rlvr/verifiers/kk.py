"""Knights and knaves: who is what, for every inhabitant (the puzzles of arXiv 2410.23123, as Logic-RL words them).

answer = {"Amelia": "knight", "Evelyn": "knave"}; right is "(1) Amelia is a knight (2) Evelyn is a knave", in the last
<answer> tag, a box, or the text behind the thinking.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_rlvr.verdict import Verdict
from megatron_rlvr.verifiers.answer_text import after_thinking, last_boxes, last_tag

ISOLATED = False  # text alone

_LONGEST = 4000  # characters of an answer
_CLAIM = re.compile(
    r"\b([A-Z][\w'-]*)\W{1,4}(?:is|must\s+be|=|:|->|→)?\W{0,4}(not\s+)?(?:(?:an?|the)\s+)?\W{0,2}(knight|knave)\b(?!s)",
    re.IGNORECASE,
)


def read_answer(value: Any) -> dict[str, str]:
    """{name: knight or knave}, from Logic-RL's {"solution_text_format": text}, from such text, or from a like mapping.

    Raises ValueError where no one is named.
    """
    if isinstance(value, dict) and "solution_text_format" in value:
        value = value["solution_text_format"]
    if isinstance(value, dict):
        roles = {str(name): str(role).lower() for name, role in value.items()}
    elif isinstance(value, str):
        roles = {name: role.lower() for name, _, role in _CLAIM.findall(value)}
    else:
        roles = {}
    if not roles or set(roles.values()) - {"knight", "knave"}:
        raise ValueError(f"must say of each name whether it is a knight or a knave, not {str(value)[:80]!r}")
    return roles


def verify(response: str, answer: dict[str, str]) -> Verdict:
    """Reward 1 where every name has its role, 0 where one has the other role, both, or is missing.

    Unparseable where nobody's role is said, and where there is more text than an answer has.
    """
    text = after_thinking(response)
    text = (last_tag(text) or last_boxes(text) or text).strip()
    if len(text) > _LONGEST:
        return Verdict(0.0, "unparseable", message=f"an answer of {len(text)} characters, more than {_LONGEST}")
    claims = _CLAIM.findall(re.sub(r"\\text\{([^{}]*)\}", r"\1", text).replace("*", ""))
    if not claims:
        return Verdict(0.0, "unparseable", extracted=text[:500], message="nobody is called a knight or a knave")
    names = {name.casefold(): name for name in answer}
    said: dict[str, set[str]] = {name: set() for name in answer}
    for name, negated, role in claims:
        if name.casefold() in names:
            said[names[name.casefold()]].add(f"not {role}" if negated else role.lower())
    right = all(said[name] == {role} for name, role in answer.items())
    return Verdict(float(right), "ok", extracted=text[:500])
