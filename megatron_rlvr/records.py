"""JSON-lines files that a kill leaves readable and a resumed run continues: metrics.jsonl and rollouts.jsonl."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any


def read_rows(path: Path) -> list[dict]:
    """The objects of a JSON-lines file, in order.

    A last line without its newline is still being written, or was cut by a kill: it is left out.
    Raises ValueError: a whole line that is not a JSON object, with the file and the line.
    """
    with open(path, "rb") as file:  # a cut may go through a character
        return _rows(file, path)


def newest_rows(path: Path, most: int) -> list[dict]:
    """read_rows of the whole lines in the file's last ``most`` bytes; a line's number is counted from there."""
    with open(path, "rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - most)
        file.seek(max(0, start - 1))
        if start:
            file.readline()  # the rest of the line that reaches over the place
        return _rows(file, path, f" from byte {file.tell():,} on" if start else "")


def _rows(file: IO[bytes], path: Path, where: str = "") -> list[dict]:
    rows = []
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            break
        rows.append(_parse(line, path, number, where))
    return rows


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines of every step after ``step``, so that a resumed run writes each step exactly once.

    The file only ever grows by ascending steps, so it is cut at one place and what stays is never rewritten.
    A missing file is left missing.
    """
    if not path.exists():
        return
    keep = 0
    with open(path, "rb+") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") or _parse(line, path, number)["step"] > step:
                break
            keep += len(line)
        file.truncate(keep)


class JsonLines:
    """A JSON-lines file that a crash leaves readable: every row is valid JSON and flushed when ``write`` returns."""

    def __init__(self, path: Path, resume_step: int) -> None:
        truncate_after(path, resume_step)
        # A lone surrogate, which JSON data may hold, is no UTF-8: it is written as the JSON escape it came from.
        self._file = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (open for the whole run)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(finite(row), ensure_ascii=False, allow_nan=False, default=str) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def finite(value: Any) -> Any:
    """``value`` with None for every NaN and infinity in it, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _parse(line: str | bytes, path: Path, number: int, where: str = "") -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f"{path}, line {number}{where} is not an object with a step: {row!r}")
    return row
