"""Processes that never outlive what started them."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however the parent ends (Linux)."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent was gone before the request
        os._exit(1)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on.

    It is used seconds later, and one that the system gave could by then be the end of somebody's connection: those get
    ports from 32768 on (Linux's ip_local_port_range), so this one lies below.
    """
    while port_in_use(port := 20000 + secrets.randbelow(12768)):  # no draw from the streams that a seed sets
        pass
    return port


def port_in_use(port: int) -> bool:
    """Whether somebody listens on ``port`` of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


class StopRequest:
    """Notes the signals that ask a run to save and end; ``number`` is the last one, 0 while nobody has asked.

    Slurm sends USR1 ahead of a time limit and TERM at preemption; INT is Ctrl-C.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.number = 0
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number


@contextmanager
def everything_made_here_stays() -> Iterator[None]:
    """For imports and construction: nothing is looked through for garbage, now or later (two of twenty seconds)."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def leave(code: int) -> NoReturn:
    """End this process with its exit handlers, but without taking apart what it imported, which takes three seconds."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
