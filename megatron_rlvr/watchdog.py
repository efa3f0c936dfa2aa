"""A run that stands still ends itself, and every rank leaves the stack of what it was doing.

Each rank calls ``beat`` at the beginning of every phase, and ``alive`` with every response, verdict and microbatch of
it. One that is silent for longer than ``run.hang_timeout`` writes its stacks to RUN/logs/hang/rank_R.txt and raises a
flag beside them; the others, who wait for it in some collective, see the flag within a second and write theirs. Then
all of them end. Files rather than messages: whatever carries messages between ranks may be what hangs.
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import IO

POLL = 1.0  # seconds between two looks
GRACE = 30.0  # seconds that the other ranks have to write their stacks
FLAG = "flag"  # who stood still first, and where
TOLD = "told"  # raised when the terminal knows: the first rank that ends may take the others with it

_watchdog: Watchdog | None = None


def watch(folder: Path, rank: int, ranks: int, seconds: float, terminal: IO[str] | None = None) -> None:
    """Start to watch this process; ``folder`` is shared by all ``ranks``, and empty or absent when the first starts.

    ``terminal`` is told which rank stood still.
    """
    global _watchdog
    _watchdog = Watchdog(folder, rank, ranks, seconds, terminal or sys.stderr)
    _watchdog.start()


def beat(phase: str) -> None:
    """This rank is alive and begins ``phase``; does nothing where nobody watches."""
    if _watchdog is not None:
        _watchdog.beat(phase)


def alive() -> None:
    """This rank gets on with its phase; does nothing where nobody watches."""
    if _watchdog is not None:
        _watchdog.beat(_watchdog.phase)


def clear(folder: Path) -> None:
    """Put the stacks of an earlier hang aside: call it before any rank watches."""
    if folder.exists() and any(folder.iterdir()):
        folder.rename(f"{folder}-{time.strftime('%Y%m%d-%H%M%S')}")


class Watchdog(threading.Thread):
    """One rank's watch, a thread of its own that ends the process."""

    def __init__(self, folder: Path, rank: int, ranks: int, seconds: float, terminal: IO[str]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.folder, self.rank, self.ranks, self.seconds, self.terminal = folder, rank, ranks, seconds, terminal
        self.armed = -math.inf  # when the timer was set
        self.beat("start")

    def beat(self, phase: str) -> None:
        self.phase, self.at = phase, time.monotonic()
        if self.at - self.armed < POLL:  # setting the timer starts a thread: too slow for each of a thousand verdicts
            return
        self.armed = self.at
        # Code that hangs without giving up Python's lock keeps this thread from running, but not a timer in C.
        faulthandler.dump_traceback_later(self.seconds + 2 * GRACE, exit=True)

    def run(self) -> None:
        flag = self.folder / FLAG
        while not flag.exists() and time.monotonic() - self.at < self.seconds:
            time.sleep(min(POLL, self.seconds / 10))
        silent = time.monotonic() - self.at
        self._write_stacks(silent)
        try:
            with flag.open("x") as file:
                file.write(f"rank {self.rank}: {self.phase}\n")
        except FileExistsError:
            self._wait_for([self.folder / TOLD])
        else:
            self._wait_for([self._stacks(rank) for rank in range(self.ranks)])
            print(self._verdict(silent), file=self.terminal, flush=True)
            (self.folder / TOLD).touch()
        os._exit(1)

    def _stacks(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.txt"

    def _write_stacks(self, silent: float) -> None:
        """Whole or not at all: the others wait for the file's name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._stacks(self.rank)
        with path.with_suffix(".tmp").open("w") as file:
            file.write(f"rank {self.rank}, process {os.getpid()}: {silent:.0f} s in phase {self.phase!r}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        path.with_suffix(".tmp").rename(path)

    def _wait_for(self, paths: list[Path]) -> None:
        """Until all are there or the grace is over."""
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and not all(path.exists() for path in paths):
            time.sleep(0.1)

    def _verdict(self, silent: float) -> str:
        missing = [rank for rank in range(self.ranks) if not self._stacks(rank).exists()]
        silence = f"; ranks {missing} did not even write those" if missing else ""
        return (
            f"error on rank {self.rank}: {silent:.0f} s without a sign of life in phase {self.phase!r}, "
            f"run.hang_timeout={self.seconds:g} at most; the stacks of all ranks are in {self.folder}{silence}"
        )
