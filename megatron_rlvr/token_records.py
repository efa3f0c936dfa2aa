"""RUN/tokens/step_N.safetensors: what the flight recorder kept of a step, one column per statistic.

A file holds ``token_ids`` [n] int32, every column [n] (fp32, or one byte for true and false), and as its metadata the
responses with their verdicts and the text of each token. It is written whole and then moved into place. With C columns
it takes at most MOST_TOKENS * (4 C + 4) bytes beside the texts: 2 MiB for 15 columns, whatever the model is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_rlvr.checkpoint_folder import sync
from megatron_rlvr.metrics import rollout_row
from megatron_rlvr.records import finite
from megatron_rlvr.types import Prompt, Rollout
from megatron_rlvr.verdict import SCORED

FOLDER = "tokens"
MOST_TOKENS = 32_768  # per step, over all recorded responses: its page stays under 5 MB too


@dataclass(frozen=True)
class Recorded:
    """A response that is recorded: its place in the step (prompt index * G + sample), its rows start .. stop-1."""

    prompt: Prompt
    rollout: Rollout
    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Recording:
    """What a step recorded: the responses, and name -> [n] over the tokens of all of them; both empty for nothing."""

    chosen: list[Recorded]
    columns: dict[str, Tensor]


@dataclass(frozen=True)
class TokenRecord:
    """A step's file, read; ``texts`` and columns are [n], over the tokens of every response.

    ``responses``: rows as in rollouts.jsonl, whose tokens are the places ``start`` .. ``stop`` - 1.
    """

    step: int
    responses: list[dict[str, Any]]
    texts: list[str]
    columns: dict[str, Tensor]

    def judged(self) -> Tensor:
        """[n] bool, the tokens of responses that a verifier could judge; the columns of others are 0."""
        found = torch.zeros(len(self.texts), dtype=torch.bool)
        for row in self.responses:
            found[row["start"] : row["stop"]] = row["status"] in SCORED
        return found


class TokenWriter:
    """Writes a step's file; one rank holds it. ``decode`` turns token ids into text, as a tokenizer does."""

    def __init__(self, run_dir: Path, decode: Callable[[list[int]], str], resume_step: int = 0) -> None:
        self._folder, self._decode = run_dir / FOLDER, decode
        self._texts: dict[int, str] = {}
        for step in recorded_steps(run_dir):
            if step > resume_step:
                record_path(run_dir, step).unlink()
                page_path(run_dir, step).unlink(missing_ok=True)
        for draft in self._folder.glob("*.new"):
            draft.unlink()

    def write(self, step: int, recording: Recording) -> None:
        """Nothing is written where nothing is recorded."""
        if not recording.columns:
            return
        self._folder.mkdir(exist_ok=True)
        chosen = recording.chosen
        ids = [token for item in chosen for token in item.rollout.response_ids[: item.stop - item.start]]
        for token in set(ids) - self._texts.keys():
            self._texts[token] = self._decode([token])
        rows = [
            rollout_row(step, item.prompt, item.rollout) | {"start": item.start, "stop": item.stop} for item in chosen
        ]
        texts = {token: self._texts[token] for token in set(ids)}
        about = {"step": step, "responses": finite(rows), "texts": texts}
        target = record_path(self._folder.parent, step)
        draft = target.with_suffix(".new")
        tensors = {"token_ids": torch.tensor(ids, dtype=torch.int32), **recording.columns}
        draft.write_bytes(save(tensors, metadata={"record": json.dumps(about, default=str)}))
        sync(draft)  # else a machine that fails may leave an empty file under the name
        os.replace(draft, target)


def record_path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step}.safetensors"


def page_path(run_dir: Path, step: int) -> Path:
    """Where the page that shows a step's file belongs."""
    return record_path(run_dir, step).with_suffix(".html")


def recorded_steps(run_dir: Path) -> list[int]:
    """The steps that have a file, in order."""
    files = (run_dir / FOLDER).glob("step_*.safetensors")
    return sorted(int(path.stem.removeprefix("step_")) for path in files)


def read_record(run_dir: Path, step: int) -> TokenRecord:
    """Raises FileNotFoundError, with the steps that there are, and ValueError for a file that is none of ours."""
    path = record_path(run_dir, step)
    if not path.exists():
        steps = recorded_steps(run_dir)
        held = f"it holds {len(steps)} steps from {steps[0]} to {steps[-1]}" if steps else "it holds none"
        raise FileNotFoundError(f"{path} does not exist: {held}; logging.record_responses sets what a run records")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["record"])
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of tokens: {error}; the flight recorder wrote no such file") from error
    texts = [about["texts"][str(token)] for token in columns.pop("token_ids").tolist()]
    return TokenRecord(about["step"], about["responses"], texts, columns)
