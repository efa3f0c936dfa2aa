"""The ranks of one machine: started together, stopped together, none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType

from megatron_rlvr.processes import StopRequest, free_port

STOPPED = tuple(128 + number for number in StopRequest.SIGNALS)  # exit codes of a rank that was asked to, and saved
CRASH_GRACE = 5.0  # seconds that the other ranks have once one has failed
POLL = 0.1


def run_ranks(command: list[str], count: int, port: int, extra: dict[str, str]) -> int:
    """Run ``command`` as ranks 0 .. count-1 and wait. Returns the first failing rank's exit code (128 + N: killed by
    signal N), or 0; 128 + N where the ranks have stopped as signal N of the launcher's own asks.

    Each rank has a session of its own, so Ctrl-C reaches the launcher alone, which passes it on, as it does TERM and
    USR1; a second one kills. There is no deadline: a step takes what it takes, and one that hangs is the watchdog's. A
    rank dies with the launcher, whatever ends that (processes.die_with_parent).
    """
    port = port or free_port()
    ranks = [_start(command, rank, count, port, extra) for rank in range(count)]
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        _signal_all(ranks, number if len(asked) == 1 else signal.SIGKILL)
        if len(asked) == 1:
            print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, pass_on) for number in StopRequest.SIGNALS}
    try:
        return _wait(ranks, asked)
    finally:
        _signal_all(ranks, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


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
    failed, deadline = 0, 0.0
    while True:
        codes = [rank.poll() for rank in ranks]
        first = next((rank for rank, code in enumerate(codes) if code not in (None, 0, *STOPPED)), None)
        if first is not None and not failed:
            failed, deadline = codes[first] or 0, time.monotonic() + CRASH_GRACE
            if failed < 0 and len(asked) < 2:  # it could not say so itself, and the others only know that it is gone
                print(f"error: rank {first} was killed by {signal.Signals(-failed).name}", file=sys.stderr, flush=True)
        if None not in codes:
            return 128 - failed if failed < 0 else failed or max(code or 0 for code in codes)
        if failed and time.monotonic() > deadline:
            _signal_all(ranks, signal.SIGKILL)
        time.sleep(POLL)


def _signal_all(ranks: list[subprocess.Popen], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)
