"""The ranks of one machine: started together, stopped together, none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType

from megatron_rlvr.processes import StopRequest, free_port

STOP_GRACE = 120.0  # seconds that asked ranks have to finish their step and save
CRASH_GRACE = 5.0  # seconds that the other ranks have once one has failed
POLL = 0.1


def run_ranks(command: list[str], count: int, port: int, extra: dict[str, str]) -> int:
    """Run ``command`` as ranks 0 .. count-1 and wait. Returns the first failing rank's exit code, or 0.

    Each rank has a session of its own, so Ctrl-C reaches the launcher alone, which passes it on as one SIGTERM each, as
    it does TERM and USR1; a second one kills. A rank dies with the launcher, whatever ends that
    (processes.die_with_parent).
    """
    port = port or free_port()
    ranks = [_start(command, rank, count, port, extra) for rank in range(count)]
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        _signal_all(ranks, signal.SIGTERM if len(asked) == 1 else signal.SIGKILL)
        if len(asked) == 1:
            print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, pass_on) for number in StopRequest.SIGNALS}
    try:
        code = _wait(ranks, asked)
    finally:
        _signal_all(ranks, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + asked[0] if asked else code


def _start(command: list[str], rank: int, count: int, port: int, extra: dict[str, str]) -> subprocess.Popen:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        **extra,
    }
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _wait(ranks: list[subprocess.Popen], asked: list[int]) -> int:
    deadline = None
    failed = 0
    while None in (codes := [rank.poll() for rank in ranks]):
        if not failed and (first := next((rank for rank, code in enumerate(codes) if code), None)) is not None:
            failed = codes[first] or 0
            if failed < 0 and not asked:  # it could not say so itself, and the others only know that it is gone
                print(f"error: rank {first} was killed by {signal.Signals(-failed).name}", file=sys.stderr, flush=True)
        if deadline is None and (failed or asked):
            deadline = time.monotonic() + (STOP_GRACE if asked else CRASH_GRACE)
        if deadline is not None and time.monotonic() > deadline:
            _signal_all(ranks, signal.SIGKILL)
        time.sleep(POLL)
    return failed or next((code for code in codes if code), 0)


def _signal_all(ranks: list[subprocess.Popen], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)
