"""RUN/checkpoints: which of its folders are checkpoints, whether one is whole, which ones may go.

    RUN/checkpoints/step_40/policy/      Megatron's distributed format, with the Hugging Face config and tokenizer
                            critic/      likewise, where there is one
                            rng/rank_R.pt  random streams of each rank
                            run.json     where the run stands, and the config that it ran with
                            manifest.json  size and checksum of every file above; written last

A checkpoint is written as step_N.partial and gets its name when all of it, manifest included, is on the disk. So there
is no pointer that could name the wrong one: the latest is the highest step that is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

MANIFEST = "manifest.json"
PARTIAL, DELETED = ".partial", ".deleted"
_NAME = re.compile(r"step_(\d+)")

Entry = dict[str, int | str]  # {"bytes": 1024, "blake2b": "9f..."}


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first: whole when they were written; ``damage`` says whether they still are."""
    found = [path for path in (run / "checkpoints").glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def inventory(folder: Path, files: Iterable[Path]) -> dict[str, Entry]:
    """Path within ``folder`` -> size and checksum of what is on the disk, after it is made to be there."""
    entries = {}
    for file in sorted(files):
        sync(file)
        entries[file.relative_to(folder).as_posix()] = _entry(file)
    return entries


def seal(partial: Path, entries: Mapping[str, Entry]) -> Path:
    """Write the manifest and give the folder its name, in the place of an earlier one; returns it under that name."""
    target = partial.with_name(partial.name.removesuffix(PARTIAL))
    with open(partial / MANIFEST, "w") as file:
        json.dump(entries, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    for path in [partial, *(item for item in partial.rglob("*") if item.is_dir())]:
        sync(path)  # names are on the disk, not only files
    if target.exists():
        remove(target)
    partial.rename(target)
    sync(target.parent)
    return target


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a checkpoint. It loses its name first: one that is half deleted is nobody's checkpoint."""
    doomed = path.with_name(path.name + DELETED)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def clear_leftovers(run: Path) -> None:
    """Delete what a kill left half written or half deleted."""
    for suffix in (PARTIAL, DELETED):
        for path in (run / "checkpoints").glob(f"step_*{suffix}"):
            shutil.rmtree(path)


def damage(folder: Path, part: int = 0, parts: int = 1, read: bool = True) -> str:
    """What is wrong with the first of every ``parts``-th file, from ``part`` on, that the manifest denies; or "".

    Without ``read`` only what shows at once: files that are missing or of another size, and run.json.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text())
        files = sorted(entries)
        wanted = {name: (entries[name]["bytes"], entries[name]["blake2b"]) for name in files}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, TypeError, KeyError, OSError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if not {"run.json", "policy/.metadata"} <= set(files):
        return f"{MANIFEST} is not the list of a checkpoint"
    return next(filter(None, (_difference(folder, name, *wanted[name], read) for name in files[part::parts])), "")


def _difference(folder: Path, name: str, size: int, checksum: str, read: bool) -> str:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{MANIFEST} names {name}, which is not in the folder"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes instead of {size}"
    if (read or name == "run.json") and _entry(path)["blake2b"] != checksum:
        return f"{name} has changed since it was written (its checksum differs)"
    return ""


def superfluous(steps: list[int], scores: Mapping[int, float], keep_last: int, keep_best: int) -> list[int]:
    """Which checkpoints go: all but the ``keep_last`` newest and the ``keep_best`` with the highest scores.

    superfluous([10, 20, 30, 40], {10: 0.5, 20: 0.9, 30: 0.6}, keep_last=1, keep_best=1) == [10, 30]
    """
    scored = sorted((step for step in steps if step in scores), key=lambda step: (scores[step], step))
    kept = set(sorted(steps)[-keep_last:]) | set(scored[max(0, len(scored) - keep_best) :])
    return [step for step in sorted(steps) if step not in kept]


def _entry(path: Path) -> Entry:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}
