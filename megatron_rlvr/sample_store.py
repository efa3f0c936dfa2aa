"""The samples of an evaluation on disk: one jsonl file per benchmark, which a second start goes on with.

OUTPUT/settings.json says what they are samples of, OUTPUT/samples/NAME.jsonl holds a StoredSample a line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.config import ConfigError, rule
from megatron_rlvr.evaluation import Outcome
from megatron_rlvr.types import FinishReason
from megatron_rlvr.verdict import Verdict, VerdictStatus, is_right


@dataclass(frozen=True)
class StoredSample:
    """One response and what was said of it.

    StoredSample(id="aime24/7", sample=3, reward=1.0, status="ok", extracted="25", tokens=812, finish_reason="stop",
                 log_prob=-310.2, text="...", right=True)
    """

    id: str
    sample: int  # 0 .. n - 1
    reward: float
    status: VerdictStatus
    extracted: str | None
    tokens: int
    finish_reason: FinishReason
    log_prob: float  # nats, summed over the tokens
    text: str  # of a benchmark whose texts are not shown: a digest
    head_std: float | None = None  # of a critic, where one is given: mean over the tokens
    right: bool | None = None  # None: no verifier could judge it, or an earlier version left that to the reward

    @property
    def verdict(self) -> Verdict:
        return Verdict(self.reward, self.status, self.extracted, right=self.right)

    @property
    def outcome(self) -> Outcome:
        right = is_right(self.verdict)
        return Outcome(
            right=right,
            answer=None if right is None else self.extracted,
            text=self.text,
            tokens=self.tokens,
            truncated=self.finish_reason == "length",
            log_prob=self.log_prob,
        )


class SampleStore:
    """The samples under ``folder``; ``problems`` holds a digest of each benchmark's.

    Raises ConfigError where it holds samples of other ``settings``, or of other problems under the same name.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], problems: dict[str, str]) -> None:
        self.folder = folder
        try:
            (folder / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the output folder {folder}: {error.strerror}") from error
        written, way_out = folder / "settings.json", "name another output folder, or delete this one"
        try:
            earlier = dict(json.loads(written.read_text())) if written.exists() else settings
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{written} is damaged, so what its samples are of is not known: {way_out}") from error
        there = earlier.get("problems", {})
        if not any(file.stat().st_size for file in (folder / "samples").iterdir()):  # a first try that was mended
            earlier = settings
        for name, value in settings.items():
            rule(
                earlier.get(name, value) == value,  # an earlier version did not write all of them
                f"{folder} holds samples with {name}={earlier.get(name)!r}, not {value!r}: {way_out}",
            )
        for name, digest in problems.items():
            rule(
                there.get(name, digest) == digest or not self._path(name).exists(),  # else nothing of it is there
                f"{folder} holds samples of other problems by the name of {name}, whose file, answers or verifier have "
                f"changed since: {way_out}",
            )
        draft = folder / "settings.json.new"  # in place in one move: a kill leaves the old ones or the new ones whole
        draft.write_text(json.dumps(settings | {"problems": there | problems}, indent=1) + "\n")
        os.replace(draft, written)

    def read(self, benchmark: str) -> dict[tuple[str, int], StoredSample]:
        """(problem id, sample index) -> sample; the line that a killed evaluation was writing is cut off the file."""
        path = self._path(benchmark)
        if not path.exists():
            return {}
        whole, newline, torn = path.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(path, len(whole + newline))
        samples = [_parse(line, f"{path}, line {number}") for number, line in enumerate(whole.splitlines(), start=1)]
        return {(sample.id, sample.sample): sample for sample in samples}

    def append(self, benchmark: str, samples: Sequence[StoredSample]) -> None:
        """Add them to the file. Raises ConfigError: a full disk, for one; what is there stays."""
        path = self._path(benchmark)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(sample)) + "\n" for sample in samples)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}; once it can be, start again to go on") from error

    def _path(self, benchmark: str) -> Path:
        return self.folder / "samples" / f"{benchmark}.jsonl"


def _parse(line: bytes, where: str) -> StoredSample:
    try:
        return StoredSample(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where} is no sample ({error}): delete the line, and it is sampled anew") from error
