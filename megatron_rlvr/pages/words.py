"""How probable the policy finds words that open a new thought, beside words that mean nothing for it.

Lp-Reg (arXiv 2510.03222v2) holds that the first are what is lost when improbable tokens are driven out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from megatron_rlvr.token_records import TokenRecord, read_record, recorded_steps

EXPLORATORY = ("but", "wait", "perhaps", "alternatively", "however")  # the paper's two lists
IRRELEVANT = ("cost", "fine", "balanced", "ere", "trans")
MOST_RECORDS = 50  # steps that are read, evenly over the run


def some_records(run_dir: Path) -> list[TokenRecord]:
    """The records of a run, at most MOST_RECORDS: evenly spaced, with the first and the last; none that is damaged."""
    steps = recorded_steps(run_dir)
    if len(steps) > MOST_RECORDS:
        steps = [steps[round(place)] for place in np.linspace(0, len(steps) - 1, MOST_RECORDS)]
    found = []
    for step in steps:
        with suppress(ValueError):
            found.append(read_record(run_dir, step))
    return found


def word_rows(records: Sequence[TokenRecord]) -> list[dict]:
    """A row per step with the mean probability of its tokens that are such words; the case and blanks do not matter.

    {"step": 12, "words/exploratory": 0.21, "words/irrelevant": 0.4}; a step without such a token lacks the name.
    """
    rows = []
    for record in records:
        row: dict = {"step": record.step}
        judged = record.judged().numpy()
        words = np.array([text.strip().lower() for text in record.texts])[judged]
        probabilities = record.columns["log_prob"].exp().numpy()[judged]
        for name, wanted in (("words/exploratory", EXPLORATORY), ("words/irrelevant", IRRELEVANT)):
            found = probabilities[np.isin(words, wanted)]
            if len(found):
                row[name] = float(found.mean())
        rows.append(row)
    return rows
