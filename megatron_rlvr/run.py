"""A run from its first step to its last: what it logs, how it stops and how it goes on."""

from __future__ import annotations

import json
import logging
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from torch import Tensor

from megatron_rlvr import platform, watchdog
from megatron_rlvr.config import Config, batch_table, dump, rule, to_dict
from megatron_rlvr.config_changes import check_resume, check_steps, settings_of
from megatron_rlvr.distributed import groups as process_groups
from megatron_rlvr.distributed import reduce
from megatron_rlvr.exploration.base import all_filled
from megatron_rlvr.metrics import MetricsWriter, RolloutsWriter
from megatron_rlvr.models.checkpoint import load, newest_usable
from megatron_rlvr.models.checkpoint_writer import CheckpointWriter
from megatron_rlvr.pages.report import build_report
from megatron_rlvr.processes import StopRequest
from megatron_rlvr.progress import Progress
from megatron_rlvr.records import read_rows
from megatron_rlvr.run_folder import HANG
from megatron_rlvr.run_warnings import warnings
from megatron_rlvr.token_records import Recording, TokenWriter
from megatron_rlvr.trainer import Trainer
from megatron_rlvr.types import RolloutGroup
from megatron_rlvr.weights.convert import save_hf

log = logging.getLogger(__name__)

REPORT_EVERY = 50  # steps
WARN_EVERY = 10  # steps


class Run:
    """One rank's view of a run; rank 0 writes what the folder keeps."""

    def __init__(self, config: Config, console: Console, stop: StopRequest) -> None:
        self.config, self.folder, self.console, self.stop = config, config.run_dir, console, stop
        platform.start_rank()
        process_groups.init(config.run.collective_timeout)
        watchdog.watch(self.folder / HANG, *process_groups.place(), config.run.hang_timeout, console.file)
        _seed_everything(config.seed)
        self.trainer = Trainer(config)
        self.is_writer = self.trainer.groups.rank == 0
        self.checkpoints = CheckpointWriter(self.folder, config, self.trainer.models, self.trainer.groups)
        # What a resumed run is held to: its config, and the prompts whatever their file is called.
        self.settings = settings_of(config, self.trainer.prompts.prompts)

    def __call__(self) -> int:
        """Every step that is left. Returns the signal that ended the run early, or 0."""
        trainer, last = self.trainer, self.config.trainer.num_steps
        done = self._resume()
        trainer.push_weights()
        stopped = 0
        with self._records(done) as records, self._progress(done) as progress:
            trainer.on_phase = progress.phase
            for step in range(done + 1, last + 1):
                figures = trainer.evaluate() if self._due_before(step) else {}
                metrics, groups = trainer.step(step)
                records.write(step, metrics | figures, groups, trainer.recording)
                progress.step(metrics, records.warning)
                stopped = self._agreed_stop()
                if stopped or self._due_after(step):
                    self._save(step)
                if stopped:
                    return self._stop_early(step, stopped)
            self.checkpoints.wait()
            final = trainer.evaluate() if trainer.held_out else {}
            records.finish(last, final)
        self._finish(final)
        return 0

    def _due_before(self, step: int) -> bool:
        """Held-out figures of row N are those of the policy that sampled step N."""
        every = self.config.trainer.eval_every
        return bool(every) and bool(self.trainer.held_out) and (step - 1) % every == 0

    def _due_after(self, step: int) -> bool:
        every = self.config.trainer.save_every
        return step == self.config.trainer.num_steps or (every > 0 and step % every == 0)

    def _agreed_stop(self) -> int:
        """The signal that any rank received: all of them stop at the same step."""
        flag = torch.tensor(float(self.stop.number), device=platform.device())
        return int(reduce.all_max(flag, self.trainer.groups.world))

    def _resume(self) -> int:
        """Steps already done. Restores everything that the next one depends on."""
        if self.config.run.resume == "never":
            return 0
        trainer = self.trainer
        path, problems = newest_usable(self.folder, trainer.models, trainer.groups)
        for problem in problems:
            self._say(problem)
        if path is None:
            rule(
                not problems,
                f"no checkpoint in {self.folder} can be used: {'; '.join(problems)}; begin anew in another run.dir",
            )
            self._say(f"{self.folder} holds no checkpoint: the run begins with step 1, and earlier records of it go")
            return 0
        check_steps(path, self.config)
        saved = json.loads((path / "run.json").read_text())["config"]
        for line in check_resume(saved, self.settings, self.config.run.accept_changes):
            self._say(line)
        state = load(path, trainer.models, trainer.groups)
        trainer.prompt_position = state["prompt_position"]
        trainer.policy_version = state["policy_version"]
        trainer.exploration.load_state_dict(state["exploration"])
        self._say(f"resuming {path} after step {state['step']}")
        return state["step"]

    def _say(self, line: str) -> None:
        if self.is_writer:
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _save(self, step: int) -> None:
        watchdog.beat("save")
        trainer = self.trainer
        state = {
            "step": step,
            "prompt_position": trainer.prompt_position,
            "policy_version": trainer.policy_version,
            "exploration": trainer.exploration.state_dict(),
            "config": self.settings,
        }
        self.checkpoints.save(state)

    def _records(self, done: int) -> Records:
        decode = self.trainer.tokenizer.decode
        return Records(self.config, self.folder, decode, done) if self.is_writer else NoRecords()

    def _progress(self, done: int) -> Progress:
        mode = self.config.logging.progress if self.is_writer else "none"
        if self.is_writer and not done:
            print_batch_table(self.config, self.console)
        return Progress(self.config.trainer.num_steps, mode, done, self.console)

    def _stop_early(self, step: int, number: int) -> int:
        if problem := self.checkpoints.wait():
            self._say(f"the checkpoint after step {step} could not be written: {problem}")
        self._say(f"{signal.Signals(number).name}: stopped after step {step}; go on with run.resume=must")
        return number

    def _finish(self, final: dict[str, float]) -> None:
        """The model as a Hugging Face folder, the last figures, the report."""
        target, weights = self.folder / "hf", _heard_of(self.trainer.policy.hf_weights())
        if not self.is_writer:
            for _ in weights:  # gathering is collective; the first rank writes
                pass
            return
        for name, value in final.items():  # before anything that can fail
            self.console.print(f"{name} {value:.3f}", highlight=False, markup=False)
        save_hf(weights, self.checkpoints.companions["policy"], target)
        (self.folder / "summary.json").write_text(
            json.dumps({"steps": self.config.trainer.num_steps, **final}, indent=1)
        )
        self.console.print(f"model   {target}", highlight=False, markup=False)
        with _may_fail("the report"):
            self.console.print(f"report  {build_report(self.folder)}", highlight=False, markup=False)


def _heard_of(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The watchdog hears of every tensor: a whole model may take longer to write than a phase may."""
    watchdog.beat("export")
    for named in weights:
        watchdog.beat("export")
        yield named


class Records:
    """What a run writes about its steps; the report is made anew every REPORT_EVERY of them."""

    def __init__(self, config: Config, folder: Path, decode: Callable[[list[int]], str], done: int) -> None:
        self.folder = folder
        settings = to_dict(config) | {"exploration": all_filled(config.exploration)}
        self.metrics = MetricsWriter(folder, config.logging, config.name, settings, done)
        self.rollouts = RolloutsWriter(folder, config.trainer.log_rollouts, done)
        self.tokens = TokenWriter(folder, decode, done)
        self.rows = read_rows(folder / "metrics.jsonl")  # of the earlier run that this one goes on from
        self.warning = ""  # the newest
        dump(config, folder / "config.yaml")  # last: from here on the folder holds a run, which refuses the next

    def write(self, step: int, metrics: dict[str, Any], groups: list[RolloutGroup], recording: Recording) -> None:
        self.metrics.write(step, metrics)
        self.rollouts.write(step, groups)
        with _may_fail(f"the tokens of step {step}"):
            self.tokens.write(step, recording)
        self.rows.append({"step": step} | metrics)
        if step % WARN_EVERY == 0 and (found := warnings(self.rows)):
            self.warning = f"from step {found[-1].step}: {found[-1].title}, {found[-1].found}"
        if step % REPORT_EVERY == 0:
            with _may_fail("the report"):
                build_report(self.folder)

    def __enter__(self) -> Records:
        return self

    def finish(self, last: int, final: dict[str, float]) -> None:
        """The held-out figures of the policy after the last step, which would have sampled the next one."""
        self.metrics.mirror(last + 1, final)

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.rollouts.close()
        self.metrics.close(failed=kind is not None)


class NoRecords(Records):
    """What every rank but the first writes: nothing."""

    def __init__(self) -> None:
        self.warning = ""

    def write(self, step: int, metrics: dict[str, Any], groups: list[RolloutGroup], recording: Recording) -> None:
        pass

    def finish(self, last: int, final: dict[str, float]) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        pass


@contextmanager
def _may_fail(what: str) -> Iterator[None]:
    """What people look at may be missing: no run ends for it, nor before a checkpoint that is due."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()  # into the rank's log
        log.warning("%s could NOT be written, and the run goes on: %s: %s", what, type(error).__name__, error)


def print_batch_table(config: Config, console: Console) -> None:
    """What each batch size means and comes to."""
    rows = batch_table(config)
    name, value = (max(len(row[column]) for row in rows) for column in (0, 1))
    for row in rows:
        console.print(f"{row[0]:<{name}}  {row[1]:<{value}}  {row[2]}", highlight=False, soft_wrap=True)


def _seed_everything(seed: int) -> None:
    """The process's own generators; sampling and data order have seeds of their own."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
