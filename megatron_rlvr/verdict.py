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
    """

    reward: float
    status: VerdictStatus
    extracted: str | None = None
    seconds: float = 0.0
    message: str = ""
