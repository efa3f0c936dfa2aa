"""A rank that stands still ends the run in bounded time, and every rank leaves its stacks: real ranks, real hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from megatron_rlvr import watchdog
from megatron_rlvr.processes import free_port

ROOT = Path(__file__).parents[1]
RANKS = 2

RANK = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
from megatron_rlvr import watchdog

folder, rank, ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def inside_a_collective():
    watchdog.beat("train")
    if rank == 1:
        where_one_rank_stops()
    dist.all_reduce(torch.ones(1))

def where_one_rank_stops():
    time.sleep(300)

def nothing_at_all():
    time.sleep(300)

def a_lock_that_is_never_given_up():
    import ctypes
    if rank == 1:
        ctypes.PyDLL(None).sleep(300)  # PyDLL keeps Python's lock
    time.sleep(300)

watchdog.GRACE = 1.0
if sys.argv[2] == "inside_a_collective":
    import torch, torch.distributed as dist
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
watchdog.watch(folder, rank, ranks, 2.0)
print("watched", flush=True)
globals()[sys.argv[2]]()
"""


def start(folder: Path, where: str) -> list[subprocess.Popen]:
    shared = {"WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "PYTHONPATH": ROOT}
    environments = [{**os.environ, "RANK": str(rank)} | {k: str(v) for k, v in shared.items()} for rank in range(RANKS)]
    command = [sys.executable, "-c", RANK, str(folder), where]
    return [
        subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for environment in environments
    ]


def outputs(ranks: list[subprocess.Popen]) -> list[str]:
    try:
        return [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def test_a_rank_that_stops_inside_a_collective(tmp_path: Path) -> None:
    """The other one waits for it in the collective; both write where they stand, and one tells the terminal."""
    ranks = start(tmp_path / "hang", "inside_a_collective")
    said = outputs(ranks)
    assert [rank.returncode for rank in ranks] == [1, 1]
    stacks = [(tmp_path / f"hang/rank_{rank}.txt").read_text() for rank in range(RANKS)]
    assert "where_one_rank_stops" in stacks[1] and "phase 'train'" in stacks[1]
    assert "all_reduce" in stacks[0]
    (verdict,) = [text for text in said if text]
    assert "without a sign of life in phase 'train'" in verdict and str(tmp_path / "hang") in verdict
    assert "did not even write" not in verdict


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
