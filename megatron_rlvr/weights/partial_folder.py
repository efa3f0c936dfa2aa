"""A folder that appears whole or not at all: written beside its place, file by file, and renamed when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megatron_rlvr.config import ConfigError, rule

_TASK = "task.json"
_TORCH_WRITER = ("inline_container", "iostream error")  # what torch.save says where it could not write
_COMPANIONS = {".json", ".txt", ".jinja", ".model"}
_NAMED_TEMPLATES = "additional_chat_templates/*.jinja"  # where transformers keeps those beside the default one


class PartialFolder:
    """``target`` while it is written, under the name target.partial.

    ``task`` is what is written, from what: where an earlier attempt at the very same was interrupted, its finished
    files are kept; anything else that lies there is thrown away. Raises ConfigError for a ``target`` that exists, and
    where the disk does not take it.
    """

    def __init__(self, target: str | Path, task: dict[str, Any]) -> None:
        self.target = Path(target)
        self.path = self.target.with_name(self.target.name + ".partial")
        written = json.dumps(task, sort_keys=True)
        try:
            rule(not self.target.exists(), f"{target} exists already: remove it, or give another name")
            if not (self.path / _TASK).is_file() or (self.path / _TASK).read_text() != written:
                shutil.rmtree(self.path, ignore_errors=True)
                self.path.mkdir(parents=True)
                self.write(_TASK, lambda file: file.write_text(written))
        except OSError as error:
            raise ConfigError(f"cannot make {self.path}: {error.strerror}; give a place that can be written") from error

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def write(self, name: str, fill: Callable[[Path], Any]) -> None:
        """One file, made by ``fill(path)``, on the disk before it has its name. Raises ConfigError for a full disk."""
        unfinished = self.path / f"{name}.unfinished"
        with self._room_for(unfinished):
            fill(unfinished)
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
        readable(unfinished)
        unfinished.rename(self.path / name)

    def copy_companions(self, source: Path, dtype: str, leave_out: tuple[str, ...] = ()) -> None:
        """The ``companions`` of ``source`` into this folder. Raises ConfigError for a full disk too."""
        contents = companions(source, leave_out)
        with self._room_for(self.path / "config.json"):
            write_companions(contents, self.path, dtype)

    @contextmanager
    def _room_for(self, file: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            if isinstance(reason, RuntimeError) and not any(words in str(reason) for words in _TORCH_WRITER):
                raise
            file.unlink(missing_ok=True)  # gives the disk its room back
            raise ConfigError(
                f"{file} could not be written: {reason}; {shutil.disk_usage(self.path).free >> 20} MiB are free: make "
                f"room, and the same command goes on where it stopped, or give a place on another disk"
            ) from error

    def finish(self) -> None:
        """Give the folder its name."""
        (self.path / _TASK).unlink()
        self.path.rename(self.target)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder to write in, which takes the place of ``target`` when the block ends well: no reader sees half."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


def readable(file: Path) -> None:
    """Let others read what its folder lets them see: safetensors keeps a file to its owner."""
    file.chmod(file.parent.stat().st_mode & 0o666)


def fingerprint(folder: Path, names: list[str]) -> list[Any]:
    """What tells these files from changed ones: name, bytes and time of writing of each."""
    stats = [(name, (folder / name).stat()) for name in sorted(names) if (folder / name).exists()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def companions(source: Path, leave_out: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Path in the folder -> content: config, generation config, tokenizer and chat templates of a model.

    Raises ConfigError for one that cannot be read, as a link to a file that is gone.
    """
    files = [file for file in source.iterdir() if file.suffix in _COMPANIONS and file.name not in leave_out]
    files = [file for file in files if not file.is_dir() and not file.name.endswith(".index.json")]
    files += source.glob(_NAMED_TEMPLATES)
    try:
        return {str(file.relative_to(source)): file.read_bytes() for file in sorted(files)}
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be read: {error.strerror}; a model needs it beside its weights"
        ) from error


def write_companions(contents: dict[str, bytes], folder: Path, dtype: str) -> None:
    """The files of ``companions`` into ``folder``; the config names the ``dtype`` of the weights."""
    config = json.loads(contents["config.json"])
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    for name, content in (contents | {"config.json": json.dumps(config, indent=2).encode()}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
