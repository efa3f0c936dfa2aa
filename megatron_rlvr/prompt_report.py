"""What was read of prompt data sets and what was dropped, row by row and in lines that a person reads."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import NamedTuple

from megatron_rlvr.prompt_rows import Row
from megatron_rlvr.verifiers.answer_forms import comparable

REPEAT, CONTRADICTION = "repeats an earlier row", "contradicting answers"
_NAMED = 3  # dropped rows that the report names, per reason


class Drop(NamedTuple):
    """A row that is not used: Drop(source="a.jsonl", row=17, field="answer", reason="no answer", detail="")."""

    source: str
    row: int  # counted from 1, as an editor counts lines
    field: str
    reason: str
    detail: str

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.source} row {self.row}, {self.field}: {self.reason}{detail}"


def unusable(drops: list[Drop]) -> list[Drop]:
    """The rows whose question is lost, in order: a repeat's is not."""
    return sorted(drop for drop in drops if drop.reason != REPEAT)


class Placed(NamedTuple):
    """A row and where it came from."""

    part: int  # index of its source
    source: str
    number: int
    row: Row

    @property
    def answer_text(self) -> str:
        """The answer in a form that can be shown."""
        answer = self.row.answer
        return answer if isinstance(answer, str) else json.dumps(answer, sort_keys=True)

    @property
    def answer_form(self) -> str:
        """The same for answers that only differ in spelling."""
        return comparable(self.row.answer) if isinstance(self.row.answer, str) else self.answer_text

    def drop(self, reason: str, detail: str) -> Drop:
        return Drop(self.source, self.number, self.row.field, reason, detail)


def used(source: str, prompts: int, drops: list[Drop], share: float) -> str:
    """The line of one source; ``share`` is that of an epoch."""
    rows = prompts + sum(drop.source == source for drop in drops)
    return f"{source}: {prompts} of {rows} rows are prompts" + (f", {share:.1%} of an epoch" if share < 1 else "")


def reasons(drops: list[Drop]) -> list[str]:
    """A line per reason: how many rows, and the first of them by name."""
    by_reason = defaultdict(list)
    for drop in sorted(drops):
        by_reason[drop.reason].append(drop)
    return [
        f"dropped {len(dropped)} rows ({reason}): "
        + "; ".join(map(str, dropped[:_NAMED]))
        + ("; ..." if len(dropped) > _NAMED else "")
        for reason, dropped in by_reason.items()
    ]


def notes(rows: list[Placed], contradictions: int, repeats: str) -> list[str]:
    """What to know beside the dropped rows: ``rows`` are all that could be read, ``repeats`` is data.repeats."""
    lines = []
    if contradictions:
        what = "kept: data.repeats=keep" if repeats == "keep" else "all their rows are dropped"
        lines.append(f"{contradictions} questions have contradicting answers ({what})")
    marked = [placed for placed in rows if placed.row.mark]
    if marked:
        marks = ", ".join(Counter(placed.row.mark for placed in marked))
        lines.append(
            f"{len(marked)} prompts hold turns of a chat template already ({marks}) and are used as they are, "
            f"the first in {marked[0].source} row {marked[0].number}"
        )
    return lines
