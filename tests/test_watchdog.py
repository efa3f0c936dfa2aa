"""A rank that stands still ends the run in bounded time, and every rank leaves its stacks: real ranks, real hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn, cast

import pytest
import torch
import torch.distributed as dist

from megatron_rlvr import watchdog
from megatron_rlvr.config import Config, from_dict
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.rollout.collect import RolloutCollector
from megatron_rlvr.rollout.engine import Engine, Sample
from megatron_rlvr.types import Prompt
from megatron_rlvr.verifiers import countdown
from megatron_rlvr.verifiers.pool import VerifierPool
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
RANKS = 2

RANK = """
import os, sys, time
from pathlib import Path
from megatron_rlvr import watchdog

folder, rank, ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def nothing_at_all():
    time.sleep(300)

def a_lock_that_is_never_given_up():
    import ctypes
    if rank == 1:
        ctypes.PyDLL(None).sleep(300)  # PyDLL keeps Python's lock
    time.sleep(300)

watchdog.GRACE = 1.0
watchdog.watch(folder, rank, ranks, 2.0)
print("watched", flush=True)
globals()[sys.argv[2]]()
"""


def start(folder: Path, where: str) -> list[subprocess.Popen]:
    shared = {**os.environ, "WORLD_SIZE": str(RANKS), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RANK, str(folder), where]
    return [
        subprocess.Popen(
            command, env=shared | {"RANK": str(rank)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(RANKS)
    ]


def outputs(ranks: list[subprocess.Popen]) -> list[str]:
    try:
        return [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


class OneAnswers:
    """An engine that never answers on rank 1; elsewhere a response takes so many ``seconds``."""

    def __init__(self, answers: bool, seconds: float = 0.0) -> None:
        self.answers, self.seconds = answers, seconds

    def generate(self, requests: list, ended: Callable[[int], None]) -> list[Sample]:
        if not self.answers:
            stand_still()
        for _ in requests:
            time.sleep(self.seconds)
            ended(1)
        return [Sample([5, 1], [-0.5, -0.1], "stop") for _ in requests]


def stand_still(*args: object) -> NoReturn:
    while True:
        time.sleep(1)


def collect(stops_in: str, seconds: float = 0.0) -> list[tuple[str, ...]]:
    """Rollouts by the real collector and verifier pool; on rank 1 one of both stands still. What it told the view."""
    config = from_dict(Config, {"parallel": {"dp": RANKS}})
    groups = ParallelGroups.from_grid(dp=RANKS)
    stops = groups.rank == 1
    pool = VerifierPool("countdown", 1, deadline=10.0)
    if stops and stops_in == "verifiers":
        countdown.verify = stand_still
    elif seconds:
        verify = countdown.verify
        countdown.verify = lambda *answer: time.sleep(seconds) or verify(*answer)
    engine, told = OneAnswers(not (stops and stops_in == "engine"), seconds), []
    tokenizer = SimpleNamespace(decode=lambda ids: "1+2")
    prompts = [Prompt(str(row), "", (1,), "countdown", {"numbers": [1, 2], "target": 3}) for row in range(4)]
    collector = RolloutCollector(config, cast("Engine", engine), tokenizer, pool, groups)
    collector.collect(
        prompts, 2, step=1, attempt=0, policy_version=0, temperature=1.0, on_phase=lambda *said: told.append(said)
    )
    return told


def collect_slowly(stops_in: str) -> None:
    counts = ["1/4", "2/4", "3/4", "4/4"]  # of this rank's two prompts with two responses each
    expected = [(phase, *done) for phase in ("generate", "verify") for done in [(), *((count,) for count in counts)]]
    assert collect(stops_in, seconds=0.7) == [*expected, ("gather",)]


def reduce(stops_in: str) -> None:
    watchdog.beat("train")
    stand_still() if dist.get_rank() == 1 else dist.all_reduce(torch.ones(1))


def watched(folder: Path, work: Callable[[str], None], stops_in: str) -> None:
    watchdog.GRACE = 5.0
    with open(folder / f"terminal_{dist.get_rank()}", "w") as terminal:
        watchdog.watch(folder / "hang", dist.get_rank(), RANKS, 2.0, terminal)
        work(stops_in)


@pytest.mark.parametrize(
    ("work", "stops_in", "phase", "waits_in"),
    [
        (reduce, "collective", "train", "all_reduce"),
        (collect, "engine", "generate", "all_gather_object"),
        (collect, "verifiers", "verify", "all_gather_object"),
    ],
)
def test_a_rank_that_stands_still_ends_all(tmp_path: Path, work, stops_in: str, phase: str, waits_in: str) -> None:
    """The other one waits for it in a collective; both write where they stand, and one tells the terminal."""
    with pytest.raises(RuntimeError, match="died without a Python exception"):
        run_ranks(RANKS, watched, tmp_path, work, stops_in, timeout=60)
    stacks = [(tmp_path / f"hang/rank_{rank}.txt").read_text() for rank in range(RANKS)]
    assert "in stand_still" in stacks[1] and f"in phase {phase!r}" in stacks[1]
    assert f"in {waits_in}" in stacks[0]
    said = "".join((tmp_path / f"terminal_{rank}").read_text() for rank in range(RANKS))
    assert "s without a sign of life in phase" in said and str(tmp_path / "hang") in said
    assert said.count("error on rank") == 1 and "did not even write" not in said


def test_responses_and_verdicts_that_keep_coming_are_no_hang(tmp_path: Path) -> None:
    """Each phase takes 2.8 s, and no rank may be silent for more than 2."""
    run_ranks(RANKS, watched, tmp_path, collect_slowly, "nowhere", timeout=60)
    assert not (tmp_path / "hang").exists()
    assert [(tmp_path / f"terminal_{rank}").read_text() for rank in range(RANKS)] == ["", ""]


def test_a_rank_that_does_not_run_at_all_is_named(tmp_path: Path) -> None:
    """SIGSTOP: it cannot write its stacks, and the other does not wait for them longer than the grace."""
    ranks = start(tmp_path / "hang", "nothing_at_all")
    assert ranks[1].stdout is not None and ranks[1].stdout.readline() == "watched\n"
    ranks[1].send_signal(signal.SIGSTOP)
    ranks[0].wait(60)
    ranks[1].kill()
    said = outputs(ranks)
    assert [rank.returncode for rank in ranks] == [1, -signal.SIGKILL]
    assert "ranks [1] did not even write those" in said[0]


def test_a_call_that_keeps_the_interpreters_lock(tmp_path: Path) -> None:
    """Its watchdog cannot run, yet its stack is written, to its own log, and it ends."""
    ranks = start(tmp_path / "hang", "a_lock_that_is_never_given_up")
    said = outputs(ranks)
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "a_lock_that_is_never_given_up" in said[1] and "Timeout" in said[1]


def test_phases_that_follow_one_another_are_no_hang(tmp_path: Path) -> None:
    body = (
        "import sys, time; from pathlib import Path; from megatron_rlvr import watchdog\n"
        "watchdog.watch(Path(sys.argv[1]), 0, 1, 1.0)\n"
        "for step in range(8):\n    watchdog.beat(str(step)); time.sleep(0.3)\n"
    )
    subprocess.run([sys.executable, "-c", body, str(tmp_path / "hang")], check=True, timeout=60, cwd=ROOT)
    assert not (tmp_path / "hang").exists()


def test_the_stacks_of_an_earlier_hang_are_put_aside(tmp_path: Path) -> None:
    folder = tmp_path / "hang"
    watchdog.clear(folder)  # none was there
    folder.mkdir()
    (folder / "rank_0.txt").write_text("where it stood")
    watchdog.clear(folder)
    assert not folder.exists()
    (kept,) = tmp_path.iterdir()
    assert (kept / "rank_0.txt").read_text() == "where it stood"


def test_nothing_happens_where_nobody_watches() -> None:
    watchdog.beat("train")
    assert watchdog._watchdog is None
