"""What a verifier says of one response. Apart from types.py because verifier processes start without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VerdictStatus = Literal["ok", "unparseable", "timeout", "error"]
SCORED = ("ok", "unparseable")  # the statuses that carry a reward


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one response; ``reward`` counts only where ``status`` is one of SCORED.

    Verdict(reward=1.0, status="ok", extracted="5*7+3", seconds=0.0002)
    ``right`` is for a reward that counts more than the answer, such as a sum's; ``is_right`` reads it.
    """

    reward: float
    status: VerdictStatus
    extracted: str | None = None
    seconds: float = 0.0
    message: str = ""
    right: bool | None = None  # None: the reward says it


def is_scored(verdict: Verdict) -> bool:
    """Whether the verdict carries a reward; the others train nothing."""
    return verdict.status in SCORED


def is_right(verdict: Verdict) -> bool | None:
    """Whether the answer is right: as the verdict says, else by a reward above 1/2; None where none was judged."""
    if not is_scored(verdict):
        return None
    return verdict.reward > 0.5 if verdict.right is None else verdict.right
