"""Rows of a data set, whatever its format: a file, a folder that ``datasets`` wrote, or a data set of the hub."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rlvr.config import ConfigError, rule

HUB = "hub:"  # hub:openai/gsm8k/main@test is the split test of the subset main of openai/gsm8k


def read_rows(source: str | Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of .jsonl, .jsonl.gz, .json, .parquet, a folder that ``datasets`` wrote, or a hub name.

    An exception stands for a row that cannot be read. Raises ConfigError for a source that cannot be.
    """
    if is_hub(source):
        yield from enumerate(_hub(str(source)), 1)
        return
    path = Path(source)
    rule(path.exists(), f"{path}: there is no such file or folder; a data set of the hub is named {HUB}OWNER/NAME")
    if path.is_dir():
        yield from enumerate(_arrow(path), 1)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _jsonl(path)
    elif path.suffix == ".json":
        try:
            rows = json.loads(path.read_bytes())  # in any of JSON's encodings, as each line of .jsonl
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        rule(isinstance(rows, list), f"{path} must hold one JSON list of rows; one row per line is called .jsonl")
        yield from enumerate(rows, 1)
    elif path.suffix == ".parquet":
        yield from enumerate(_parquet(path), 1)
    else:
        raise ConfigError(f"{path} is none of .jsonl, .jsonl.gz, .json, .parquet, a folder of arrow files")


def is_hub(source: str | Path) -> bool:
    return str(source).startswith(HUB)


def source_name(source: str | Path) -> str:
    """What reports call a source: the file's name, or the hub name as it is."""
    return str(source) if is_hub(source) else Path(source).name


def stem(name: str) -> str:
    """What a source's ids and figures begin with: its name without the file's endings, "aime24" for aime24.jsonl.gz."""
    return name if is_hub(name) else name.removesuffix(".gz").rpartition(".")[0] or name


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8; lists in lists without end
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
    from datasets import load_from_disk  # a second of imports that the other formats do not need

    try:
        rows = load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{path} is not a folder of arrow files that datasets.save_to_disk wrote: {error}") from error
    if isinstance(rows, dict):
        raise ConfigError(f"{path} holds the splits {', '.join(rows)}: name one, as {path}/{next(iter(rows))}")
    yield from rows


def _hub(source: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    repository, _, split = source.removeprefix(HUB).partition("@")
    owner, _, rest = repository.partition("/")
    name, _, subset = rest.partition("/")
    rule(
        bool(owner and name),
        f"{source} must look like {HUB}OWNER/NAME, {HUB}OWNER/NAME/SUBSET or {HUB}OWNER/NAME@SPLIT",
    )
    try:
        rows = load_dataset(f"{owner}/{name}", subset or None, split=split or "train")
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # no network, no such name, no permission, a script
        raise ConfigError(
            f"{source} cannot be loaded from the hub: {error}; without a network give the path of a local copy"
        ) from error
    yield from rows
