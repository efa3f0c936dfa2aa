"""Training checkpoints written while the run goes on: whole or not at all, and no older one goes before it is there."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial as bind
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

from megatron_rlvr import checkpoint_folder, watchdog
from megatron_rlvr.config import Config
from megatron_rlvr.distributed import reduce, sharded_files
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.models import random_streams, sharded_state
from megatron_rlvr.models.checkpoint import Models, layout_of, shapes_of, tensors_of, write_tensors
from megatron_rlvr.models.trainable import Trainable
from megatron_rlvr.records import read_rows
from megatron_rlvr.weights.megatron_folder import FORMAT
from megatron_rlvr.weights.partial_folder import companions, write_companions

log = logging.getLogger(__name__)

TIMEOUT = 3600.0  # seconds that the writers wait for one another
BEAT = 1.0  # seconds between two signs of life of a rank that waits for its writer
RECORDS = ("metrics.jsonl", "rollouts.jsonl")
SCORE = "eval/pass@1"  # of the policy that a checkpoint holds: the row of the step after it has it


class WriteFailed(Exception):
    """A checkpoint that could not be written, on whichever rank; the run goes on with those there are."""


class CheckpointWriter:
    """Writes one checkpoint at a time beside the step; every rank holds one and calls it at the same steps.

    ``save`` copies to host memory what this rank writes, and returns; a thread writes it, with collectives of its own.
    """

    def __init__(self, run: Path, config: Config, models: Models, groups: ParallelGroups) -> None:
        self.run, self.config, self.models, self.groups = run, config, models, groups
        # Read once: the folder may change, or go, while the run goes on with what was in it.
        self.companions = {name: companions(Path(model.path), leave_out=(FORMAT,)) for name, model in models.items()}
        self._group = sharded_files.background_group(TIMEOUT)
        self._thread: threading.Thread | None = None
        self._began = 0.0  # when the part of the write that goes on began
        self._problem = ""
        self.stalled = 0.0  # seconds that the last save kept the step waiting
        self.written = 0.0  # seconds from then on until it was whole

    def save(self, state: dict[str, Any]) -> None:
        """Begin RUN/checkpoints/step_N, N = state["step"]; ``state`` is plain values, the same on every rank."""
        started = time.perf_counter()
        self.wait()
        tensors = {name: _copies(model) for name, model in self.models.items()}
        progress = {name: _progress(model) for name, model in self.models.items()}
        state = state | {"models": progress, "shapes": shapes_of(self.models), "layout": layout_of(self.groups)}
        arguments = (state, tensors, random_streams.streams())
        self.stalled = time.perf_counter() - started
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> str:
        """Until nothing is being written; what was wrong with the last one, "" where it is there.

        A slow disk is no hang: the watchdog hears of this rank as long as its writer keeps to its own limit.
        """
        while self._thread is not None and self._thread.is_alive():
            if time.monotonic() - self._began < TIMEOUT:
                watchdog.beat("save")
            self._thread.join(BEAT)
        self._thread = None
        return self._problem

    def _write(self, state: dict[str, Any], tensors: dict[str, list[ShardedTensor]], streams: dict[str, Any]) -> None:
        step, started = state["step"], time.perf_counter()
        folder = self.run / "checkpoints" / f"step_{step}{checkpoint_folder.PARTIAL}"
        self._problem = "its writer ended without a word"
        try:
            self._together(bind(self._begin, folder, state))
            for name, parts in tensors.items():
                self._together(bind(write_tensors, parts, folder / name, self._group))
            entries = self._together(bind(self._end, folder, streams))
            self._together(bind(self._publish, folder, {key: item for part in entries for key, item in part.items()}))
            self._problem = ""
            self.written = time.perf_counter() - started
            log.info("step_%d: the run stood still for %.2f s, written in %.1f s", step, self.stalled, self.written)
        except Exception as error:  # whatever it is, the step goes on: the checkpoints before are untouched
            self._problem = f"{error}; {shutil.disk_usage(self.run).free >> 20} MiB are free"
            if self.groups.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)  # gives the disk its room back
                newest = [path.name for path in checkpoint_folder.checkpoints(self.run)[-1:]]
                log.warning("step_%d could NOT be written (%s); the newest is %s", step, self._problem, newest)

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """What every rank's action returned. Raises WriteFailed on all of them where one has failed."""
        self._began = time.monotonic()
        try:
            outcome = (action(), "")
        except Exception as error:
            outcome = (None, f"rank {self.groups.rank}: {type(error).__name__}: {error}")
        outcomes = reduce.gather_objects(outcome, self._group)
        failed = [reason for _, reason in outcomes if reason]
        if failed:
            raise WriteFailed(failed[0])
        return [result for result, _ in outcomes]

    def _begin(self, folder: Path, state: dict[str, Any]) -> None:
        if self.groups.rank:
            return
        checkpoint_folder.clear_leftovers(self.run)
        for name in self.models:
            (folder / name).mkdir(parents=True)
            write_companions(self.companions[name], folder / name, state["shapes"][name]["dtype"])
        (folder / "rng").mkdir()
        (folder / "run.json").write_text(json.dumps(state))

    def _end(self, folder: Path, streams: dict[str, Any]) -> dict[str, checkpoint_folder.Entry]:
        """The inventory of this rank's files; the first rank has all that no other wrote."""
        rank = self.groups.rank
        torch.save(streams, folder / "rng" / f"rank_{rank}.pt")
        own = [*folder.glob(f"*/__{rank}_*.distcp"), folder / "rng" / f"rank_{rank}.pt"]
        if rank == 0:
            own += [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".distcp", ".pt")]
            own += folder.glob("*/common.pt")
        return checkpoint_folder.inventory(folder, own)

    def _publish(self, folder: Path, entries: dict[str, checkpoint_folder.Entry]) -> None:
        """Only when the new one is there do older ones go."""
        if self.groups.rank:
            return
        # The record of the steps is on the disk before a run can go on behind them.
        for name in RECORDS:
            if (self.run / name).exists():
                checkpoint_folder.sync(self.run / name)
        now = checkpoint_folder.step_of(checkpoint_folder.seal(folder, entries))
        keep, there = self.config.trainer, checkpoint_folder.checkpoints(self.run)
        # Those of later steps are of a future that this run has turned from: the newest to stay is the one just made.
        steps = [step for path in there if (step := checkpoint_folder.step_of(path)) <= now]
        for step in checkpoint_folder.superfluous(steps, _scores(self.run), keep.keep_last, keep.keep_best):
            checkpoint_folder.remove(self.run / "checkpoints" / f"step_{step}")


def _copies(model: Trainable) -> list[ShardedTensor]:
    """Host copies of what this rank writes: of each element, one rank holds the main replica."""
    return [
        dataclasses.replace(tensor, data=tensor.data.detach().to("cpu", copy=True))
        for tensor in tensors_of(model)
        if is_main_replica(tensor.replica_id)
    ]


def _progress(model: Trainable) -> dict[str, int]:
    return {"updates": sharded_state.updates_done(model), "scheduled": model.scheduler.num_steps}


def _scores(run: Path) -> dict[int, float]:
    """Step -> held-out figure of the checkpoint after it."""
    path = run / "metrics.jsonl"
    rows = read_rows(path) if path.exists() else []
    return {row["step"] - 1: row[SCORE] for row in rows if row.get(SCORE) is not None}
