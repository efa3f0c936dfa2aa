"""``run_ranks``: a function on several forked gloo ranks, with a deadline that always ends them.

Forking shares what is already imported: four ranks cost a second or two instead of four imports of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from megatron_rlvr import platform
from megatron_rlvr.processes import free_port

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class RankFailed(Exception):
    """A rank's own traceback, shown as the cause of the exception that is raised again in the test."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """``fn(*args)`` on each of ``world_size`` ranks in one gloo group -> what each rank returned, by rank.

    Inside, ``torch.distributed`` is initialised and the RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of
    torchrun are set. The first exception of a rank is raised again here; TimeoutError after ``timeout`` seconds says
    where each rank stood. In every case no process is left.

    On a GPU one rank is this process, with NCCL and without a deadline of its own: CUDA and forks do not get on.
    """
    if platform.has_gpu() and world_size == 1:
        return [_as_this_process(fn, args)]
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    context = multiprocessing.get_context("fork")
    deadline, port = time.monotonic() + timeout, free_port()
    processes, pipes = [], {}
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            task = (rank, world_size, folder, port, timeout, theirs, fn, args)
            process = context.Process(target=_rank_main, args=task)
            process.start()
            theirs.close()  # else the pipe stays open when the rank dies
            processes.append(process)
            pipes[ours] = rank
        return _collect(pipes, deadline, folder)
    finally:
        for process in processes:
            _kill_session(cast("int", process.pid))
            process.join()
        for pipe in pipes:
            pipe.close()
        shutil.rmtree(folder)


def _as_this_process(fn: Callable[..., Any], args: tuple) -> Any:
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in _environment(0, 1, free_port()).items():
            patch.setenv(name, value)
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group(platform.backend(), store=store, rank=0, world_size=1)
        try:
            return fn(*args)
        finally:
            dist.destroy_process_group()


def _collect(pipes: dict[Connection, int], deadline: float, folder: Path) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(pipes)
    while waiting:
        ready = _ready(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = sorted(waiting.values())
            stacks = "".join(f"\nrank {rank}:\n{_stack(folder, rank)}" for rank in late)
            raise TimeoutError(f"ranks {late} had not finished at the deadline{stacks}")
        for pipe in ready:
            rank = waiting.pop(pipe)
            ok, when, value = _receive(pipe, rank)
            if not ok:
                _raise_first([(when, rank, value)], waiting)
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


def _raise_first(failures: list[tuple[float, int, Any]], waiting: dict[Connection, int]) -> None:
    """When one rank fails its peers soon lose their connections: the earliest failure is the cause."""
    time.sleep(0.2)
    for pipe in _ready(waiting, timeout=0):
        rank = waiting[pipe]
        ok, when, value = _receive(pipe, rank)
        if not ok:
            failures.append((when, rank, value))
    _, rank, (error, text) = min(failures, key=lambda failure: failure[:2])
    raise error from RankFailed(f"on rank {rank}:\n{text}")


def _ready(waiting: dict[Connection, int], timeout: float) -> list[Connection]:
    return cast("list[Connection]", wait(list(waiting), timeout))


def _receive(pipe: Connection, rank: int) -> tuple[bool, float, Any]:
    """(ok, when, result or (exception, traceback)); a rank that died without a word failed before all others."""
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, 0.0, (RuntimeError(f"rank {rank} died without a Python exception"), "")


def _rank_main(
    rank: int, world_size: int, folder: Path, port: int, timeout: float, pipe: Connection, fn: Callable, args: tuple
) -> None:
    os.setsid()  # a session of its own, so that what the rank starts can be ended with it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)  # a thread pool that was used before the fork would hang
    os.environ.update(_environment(rank, world_size, port))
    with open(folder / f"stack-{rank}", "w") as stack:
        faulthandler.dump_traceback_later(0.9 * timeout, file=stack)
        try:
            # a file and not a port: two test runs can never take each other's place
            store = dist.FileStore(str(folder / "store"), world_size)
            limit = timedelta(seconds=timeout)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
            result = fn(*args)
            message = pickle.dumps((True, time.monotonic(), result))
        except BaseException as error:
            message = _failure(error)
        pipe.send_bytes(message)
        faulthandler.cancel_dump_traceback_later()
        signal.pause()  # until all are killed: a rank that leaves closes connections that others still read


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    ids = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    return {name: str(value) for name, value in (address | ids).items()}


def _failure(error: BaseException) -> bytes:
    when, text = time.monotonic(), traceback.format_exc()
    try:
        message = pickle.dumps((False, when, (error, text)))
        pickle.loads(message)  # an exception with its own constructor may refuse
        return message
    except Exception:
        return pickle.dumps((False, when, (RuntimeError(f"{type(error).__name__}: {error}"), text)))


def _stack(folder: Path, rank: int) -> str:
    file = folder / f"stack-{rank}"
    return file.read_text() if file.exists() else "  not started\n"


def _kill_session(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        # between fork and setsid there is no such session yet
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
