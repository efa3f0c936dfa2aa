"""A file of responses -> the same rows with a verdict each, in order; a killed run goes on behind the last whole row.

verify_file(Path("samples.jsonl"), Path("verified.jsonl"), "math", workers=8, deadline=10.0)
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_rlvr.config import ConfigError, rule
from megatron_rlvr.verdict import Verdict, is_right
from megatron_rlvr.verifiers import load
from megatron_rlvr.verifiers.pool import VerifierPool

GAINED = ("reward", "status", "extracted", "seconds", "message", "right", "verifier")


def verify_file(
    source: Path,
    target: Path,
    verifier: str,
    *,
    workers: int,
    deadline: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Counter[str]:
    """Score each JSON line {response, answer, ...} of ``source`` into ``target``; how many have which status.

    ``deadline``: seconds of CPU time per row. ``progress`` is called with (rows done, rows in all). Every row of the
    source is checked before the first is scored. Raises ConfigError: a row that cannot be scored, a target of other
    rows or of another verifier, an unknown verifier or one that this machine cannot run.
    """
    rule(source.is_file(), f"{source}: there is no such file")
    rule(workers >= 1, f"--workers must be at least 1, not {workers}")
    rule(0 < deadline < math.inf, f"--deadline must be above 0 seconds and have an end, not {deadline:g}")
    read_answer = load(verifier).read_answer
    total = sum(1 for number, row in _rows(source) if _item(source, number, row, read_answer))
    rule(total > 0, f"{source} holds no row")
    counts = _resume(source, target, verifier)
    done = counts.total()
    progress(done, total)
    if done == total:
        return counts
    todo = (_item(source, number, row, read_answer) for number, row in islice(_rows(source), done, None))
    with VerifierPool(verifier, workers, deadline) as pool, target.open("a") as output:
        for (_, row), verdict in zip(islice(_rows(source), done, None), pool.stream(todo), strict=True):
            output.write(json.dumps(row | _gain(verdict, verifier)) + "\n")
            output.flush()
            counts[verdict.status] += 1
            progress(counts.total(), total)
    return counts


def _gain(verdict: Verdict, verifier: str) -> dict[str, Any]:
    return {**vars(verdict), "right": is_right(verdict), "verifier": verifier}


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, row) of every line that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:  # broken JSON or broken UTF-8
                    raise ConfigError(f"{path} line {number} is no JSON: {error}") from error


def _item(path: Path, number: int, row: Any, read_answer: Callable[[Any], Any]) -> tuple[str, Any]:
    """(response, answer as the verifier wants it). Raises ConfigError."""
    at = f"{path} line {number}"
    rule(isinstance(row, dict), f"{at} must hold an object with response and answer, not {str(row)[:80]!r}")
    for field in ("response", "answer"):
        rule(
            field in row, f"{at} has no {field}, but {', '.join(row) or 'nothing'}: each row needs response and answer"
        )
    rule(isinstance(row["response"], str), f"{at}: response must be text, not {row['response']!r:.80}")
    try:
        return row["response"], read_answer(row["answer"])
    except ValueError as error:
        raise ConfigError(f"{at}: the verifier cannot take the answer: {str(error)[:200]}") from error
    except Exception as error:  # of a verifier of the user's own
        raise ConfigError(f"{at}: read_answer failed with {type(error).__name__}: {str(error)[:200]}") from error


def _resume(source: Path, target: Path, verifier: str) -> Counter[str]:
    """The statuses of the rows that an earlier run has left in ``target``; the rest of a row is cut off.

    Raises ConfigError where they are not the first rows of ``source``, scored by this verifier.
    """
    counts: Counter[str] = Counter()
    if not target.exists():
        return counts
    whole = 0
    with target.open("rb") as lines:
        rows = _rows(source)
        for line in lines:
            if not line.endswith(b"\n"):
                break
            number, row = next(rows, (0, {}))
            try:
                old = {"right": None} | json.loads(line)  # earlier versions wrote no such field
                same = old["verifier"] == verifier and old == row | {field: old[field] for field in GAINED}
            except (ValueError, KeyError, TypeError):
                same = False
            rule(
                same,
                f"{target} is in the way: its row {counts.total() + 1} is not {source} line {number} scored by "
                f"{verifier}. Name another output, or remove it to start again",
            )
            counts[old["status"]] += 1
            whole += len(line)
    with target.open("rb+") as output:
        output.truncate(whole)
    return counts
