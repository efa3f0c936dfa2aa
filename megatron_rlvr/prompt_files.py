"""Rows of a data file, whatever its format."""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rlvr.config import ConfigError, rule


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of .jsonl, .jsonl.gz, .json, .parquet or a folder that ``datasets`` wrote.

    An exception stands for a row that cannot be read. Raises ConfigError for a file that cannot be.
    """
    rule(path.exists(), f"data.path={str(path)!r}: there is no such file")
    if path.is_dir():
        yield from enumerate(_arrow(path), 1)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _jsonl(path)
    elif path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        rule(isinstance(rows, list), f"{path} must hold one JSON list of rows; one row per line is called .jsonl")
        yield from enumerate(rows, 1)
    elif path.suffix == ".parquet":
        yield from enumerate(_parquet(path), 1)
    else:
        raise ConfigError(
            f"data.path={str(path)!r} is none of .jsonl, .jsonl.gz, .json, .parquet, a folder of arrow files"
        )


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:  # broken JSON or broken UTF-8
                        yield number, error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is not a whole gzip file: {error}") from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path} cannot be read as parquet: {error}") from error


def _arrow(path: Path) -> Iterator[dict[str, Any]]:
    rule(
        importlib.util.find_spec("datasets") is not None,
        f"reading {path}, a folder of arrow files, needs the package datasets: install it, or give a .parquet file",
    )
    from datasets import load_from_disk

    try:
        yield from load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{path} is not a folder that datasets.save_to_disk wrote: {error}") from error
