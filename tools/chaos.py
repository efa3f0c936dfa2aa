"""Kill a run at random moments and resume it each time: python tools/chaos.py [--kills 30 --steps 12 --seed 0]

The countdown demo on two ranks, shortened, with a checkpoint after every step. Both ranks get SIGKILL at a random point
of generation, verification, update, weight sync or save, in turn. Then the run is resumed. In the end
metrics (times aside), rollouts, weights and optimizer state must equal those of a run that nobody disturbed, byte for
byte. One JSON line per kill and one per run; the last one says whether all do, and so does the exit code.

Ranks are forked from a process that has imported everything, which saves two thirds of each start.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rlvr.processes import die_with_parent, free_port, leave

CONFIG = "examples/countdown_cpu/config.yaml"
SHORT = [
    *("data.eval_path=", "logging.tensorboard=false", "logging.progress=none", "trainer.save_every=1"),
    *("rollout.prompts_per_step=8", "rollout.responses_per_prompt=8", "trainer.log_rollouts=64", "run.resume=auto"),
]
MOMENTS = ["generation", "verification", "update", "weight sync", "save"]
DEADLINE = 240.0  # seconds until a moment must have come, or a run must have ended
TIMES = ("time/", "memory/", "tokens/per_second", "sync/seconds", "sync/proof_seconds")

_context = multiprocessing.get_context("fork")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"kills": 30, "steps": 12, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    options = parser.parse_args()
    import_everything()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))  # whose context manager would delete it when a forked rank ends
    try:
        whole = folder / "whole"
        assert Attempt(whole, options.steps).finish() == 0, f"the undisturbed run failed: {last_words(whole)}"
        return 0 if disturb(folder, whole, options) else 1
    finally:
        shutil.rmtree(folder)


def disturb(folder: Path, whole: Path, options: argparse.Namespace) -> bool:
    """Kill until ``options.kills`` are done, over as many runs as that takes; whether each equals ``whole``."""
    draw, done, differences, began = random.Random(options.seed), 0, [], time.perf_counter()
    runs, moments = 0, list[str]()
    while done < options.kills:
        runs += 1
        run, saved = folder / f"run_{runs}", list[int]()
        attempt = Attempt(run, options.steps)
        while done < options.kills:
            moments = moments or draw.sample(MOMENTS, len(MOMENTS))
            if not attempt.kill_in(moments[-1], draw):
                break  # the run ended first
            done, moment = done + 1, moments.pop()
            print(json.dumps({"kill": done, "run": runs, "moment": moment, "steps": steps_done(run)}), flush=True)
            saved.append(steps_done(run)[1])
            attempt = Attempt(run, options.steps)
        code = attempt.finish()
        found = [f"run {runs} ended with {code}: {last_words(run)}"] if code else difference(run, whole)
        found += not_resumed(run, saved)
        print(json.dumps({"run": runs, "equal": not found}), flush=True)
        differences += found
        shutil.rmtree(run)
    seconds = round(time.perf_counter() - began)
    print(
        json.dumps({"kills": done, "runs": runs, "steps": options.steps, "equal": not differences, "seconds": seconds})
    )
    for line in differences:
        print(line, file=sys.stderr)
    return not differences


class Attempt:
    """Two ranks of a run that starts, or goes on, in ``folder``."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder = folder
        self._now, self._saving = _context.Value("i", -1, lock=False), _context.Value("i", 0, lock=False)
        arguments = [CONFIG, *SHORT, f"trainer.num_steps={steps}", f"run.dir={folder}"]
        port = free_port()
        prepare(arguments)
        output = folder.with_suffix(".log")
        cells = (output, self._now, self._saving)
        self.ranks = [_context.Process(target=be_rank, args=(rank, port, arguments, *cells)) for rank in (0, 1)]
        for rank in self.ranks:
            rank.start()

    def kill_in(self, moment: str, draw: random.Random) -> bool:
        """Kill both ranks in one of the first's next four times of ``moment``; False if the run ended before."""
        comes = self._is_in(moment)
        for _ in range(draw.randrange(4)):  # let this many go by
            if not (self._until(comes, True) and self._until(comes, False)):
                return False
        if not self._until(comes, True):
            return False
        time.sleep(draw.random() * {"save": 0.2, "verification": 0.02}.get(moment, 0.1))
        for rank in draw.sample(self.ranks, 2):
            rank.kill()
        for rank in self.ranks:
            rank.join()
        return True

    def finish(self) -> int:
        """Wait for the run's end; the first exit code that is not 0."""
        deadline = time.monotonic() + DEADLINE
        for rank in self.ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
            if rank.exitcode is None:
                for late in self.ranks:
                    late.kill()
        return next((rank.exitcode or -1 for rank in self.ranks if rank.exitcode != 0), 0)

    def _is_in(self, moment: str) -> Callable[[], bool]:
        if moment == "save":
            return lambda: bool(self._saving.value)
        return lambda: self._now.value == MOMENTS.index(moment)

    def _until(self, condition: Callable[[], bool], wanted: bool) -> bool:
        deadline = time.monotonic() + DEADLINE
        while condition() is not wanted:
            if not all(rank.is_alive() for rank in self.ranks):
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"the moment did not come: {last_words(self.folder)}")
            time.sleep(0.0005)
        return True


def import_everything() -> None:
    """What a rank imports, in the surroundings that it imports it in."""
    import torch

    from megatron_rlvr import platform, run  # noqa: F401 (run imports Megatron)
    from megatron_rlvr.rollout import vllm_settings

    torch.set_num_threads(1)
    vllm_settings.set_environment()
    platform.spare_vllm_small_compiles()
    from vllm import LLM  # noqa: F401


def prepare(arguments: list[str]) -> None:
    """The launcher's part."""
    from megatron_rlvr.config import load_config
    from megatron_rlvr.train import _prepare

    _prepare(load_config(arguments[0], arguments[1:]))


def be_rank(rank: int, port: int, arguments: list[str], output: Path, now: Any, saving: Any) -> None:
    """A rank's life in a forked process; what a terminal would show of it goes to ``output``."""
    from megatron_rlvr import train

    die_with_parent()
    with open(output, "a") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ[train.LAUNCHED] = "1"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if rank == 0:
        show_moments(now, saving)
    try:
        code = train.main(arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


def show_moments(now: Any, saving: Any) -> None:
    """Let ``now`` tell which moment this rank is in, and ``saving`` whether its checkpoint is being written."""
    from megatron_rlvr import trainer, verifiers
    from megatron_rlvr.models.checkpoint_writer import CheckpointWriter
    from megatron_rlvr.models.policy import Policy
    from megatron_rlvr.rollout.vllm_engine import VllmEngine

    def show(owner: Any, name: str, cell: Any, value: int, otherwise: int) -> None:
        plain = getattr(owner, name)

        def shown(*args: Any, **kwargs: Any) -> Any:
            cell.value = value
            try:
                return plain(*args, **kwargs)
            finally:
                cell.value = otherwise

        setattr(owner, name, shown)

    show(VllmEngine, "generate", now, 0, -1)
    show(verifiers, "score_groups", now, 1, -1)
    show(Policy, "update", now, 2, -1)
    show(trainer.Trainer, "push_weights", now, 3, -1)
    show(CheckpointWriter, "_write", saving, 1, 0)


def steps_done(run: Path) -> list[int]:
    """Steps in the record, and in the newest checkpoint."""
    from megatron_rlvr.checkpoint_folder import checkpoints, step_of

    rows = (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0
    return [rows, max((step_of(path) for path in checkpoints(run)), default=0)]


def not_resumed(run: Path, saved: list[int]) -> list[str]:
    """What says that a start did not go on from the newest checkpoint: begun anew, a run would end the same."""
    said = [int(step) for step in re.findall(r"resuming .* after step (\d+)", run.with_suffix(".log").read_text())]
    wanted = [step for step in saved if step]
    return [] if said == wanted else [f"{run.name}: resumed after steps {said}, but had checkpoints of {wanted}"]


def difference(run: Path, whole: Path) -> list[str]:
    """What the run's record, model and last checkpoint have that the undisturbed one's have not."""
    found = []
    rows, wanted = (
        [
            {key: value for key, value in json.loads(line).items() if not key.startswith(TIMES)}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (run, whole)
    )
    if rows != wanted:
        steps = [row["step"] for row, other in zip(rows, wanted, strict=False) if row != other]
        found.append(f"{run.name}: {len(rows)} rows of metrics, of which {steps} differ")
    names = ["rollouts.jsonl", "hf/model.safetensors"]
    last = max((whole / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step_")))
    names += [path.relative_to(whole).as_posix() for path in last.glob("policy/*.distcp")]
    return found + [
        f"{run.name}: {name} differs" for name in names if (run / name).read_bytes() != (whole / name).read_bytes()
    ]


def last_words(folder: Path) -> str:
    return "".join(f"\n--- {path}\n{path.read_text()[-3000:]}" for path in sorted((folder / "logs").glob("*.log")))


if __name__ == "__main__":
    sys.exit(main())
