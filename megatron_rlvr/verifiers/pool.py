"""Verifier processes with a hard deadline per answer.

A verifier that computes forever or crashes costs its own answer and nothing else: the process is killed, replaced, and
the answer's status says so. The processes are fresh interpreters, not forks of one that holds Megatron and vLLM.

The deadline is in CPU time, so that a loaded machine turns no right answer into a timeout; WALL times as much wall time
ends what only sleeps. A worker whose memory has grown past RECYCLE is replaced between two answers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

from megatron_rlvr.verdict import Verdict, VerdictStatus
from megatron_rlvr.verifiers import VerifierError, check_host, is_scored, judge, load

WALL = 6.0  # wall time per answer, in deadlines
RECYCLE = 512  # MiB of peak resident memory; sympy starts near 100
AHEAD = 256  # items per worker that are read ahead of the oldest verdict that is not out yet
CACHED = 20_000  # verdicts kept: a step's responses repeat where answers are short
_STARTUP = 120.0  # seconds until a process is ready; importing sympy takes about one
_ROOT = str(Path(__file__).resolve().parents[2])


@dataclass
class _Job:
    line: bytes  # the request: JSON of [response, answer]
    key: bytes
    verdict: Verdict | None = None


@dataclass
class _Worker:
    process: subprocess.Popen
    requests: IO[bytes]
    replies: IO[bytes]
    expires: float  # time.monotonic() at which it is killed; inf while it idles
    sent: float = 0.0  # time.monotonic() when its job was
    ready: bool = False
    job: _Job | None = None  # that it works on
    buffer: bytes = b""

    @classmethod
    def start(cls, name: str, deadline: float) -> _Worker:
        path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "megatron_rlvr.verifiers.worker", name, str(deadline)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C reaches the trainer only, and the group can be killed as a whole
        )
        assert process.stdin is not None and process.stdout is not None  # both are pipes
        return cls(process, process.stdin, process.stdout, time.monotonic() + _STARTUP)

    def send(self, job: _Job, limit: float) -> None:
        """Hand out one job: a worker reads its whole request before it writes, so neither pipe can fill up for good."""
        self.job, self.sent = job, time.monotonic()
        self.expires = self.sent + limit
        with suppress(BrokenPipeError):  # it died just now: the end of its stdout says so next
            self.requests.write(job.line)
            self.requests.flush()

    def kill(self) -> None:
        """SIGKILL to the process and whatever it started; returns when it is gone."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.replies.close()
        with suppress(BrokenPipeError):
            self.requests.close()


class VerifierPool:
    """``workers`` processes for an ISOLATED verifier, none for the others, whose answers are scored in place.

    Create it, and call ``score``, from a thread that lives as long as the run: the kernel ties a worker's life to the
    thread that started it. ``deadline`` is in seconds of CPU time per answer. Raises ConfigError for an
    unknown verifier, and for one that this machine cannot run.
    """

    def __init__(self, name: str, workers: int, deadline: float) -> None:
        self.name, self.deadline = name, deadline
        self._verifier = load(name)
        check_host(self._verifier)
        count = workers if self._verifier.ISOLATED else 0
        self._workers = [_Worker.start(name, deadline) for _ in range(count)]
        self._cache: OrderedDict[bytes, Verdict] = OrderedDict()
        self._window: deque[_Job] = deque()  # read and not yet out, in the order of the items
        self._waiting: deque[_Job] = deque()  # of these, what no worker has yet
        self._pending: dict[bytes, _Job] = {}  # of these, what has no verdict yet
        self._closed = False

    def score(self, items: Sequence[tuple[str, Any]]) -> list[Verdict]:
        """The verdicts of (response, answer) pairs, in their order.

        Raises VerifierError where a worker process cannot start.
        """
        return list(self.stream(items))

    def stream(self, items: Iterable[tuple[str, Any]]) -> Iterator[Verdict]:
        """The same, one by one as they come; reads no more than AHEAD items per worker ahead of what has come out."""
        if self._closed:
            raise VerifierError(f"the {self.name} verifier pool is closed")
        if not self._verifier.ISOLATED:
            yield from (judge(self._verifier, response, answer) for response, answer in items)
            return
        try:
            yield from self._stream(iter(items))
        except BaseException:  # half-done work would answer the next call
            self.close()
            raise

    def _stream(self, items: Iterator[tuple[str, Any]]) -> Iterator[Verdict]:
        while True:
            for response, answer in islice(items, AHEAD * len(self._workers) - len(self._window)):
                self._admit(json.dumps([response, answer]).encode() + b"\n")
            if not self._window:
                return
            if (verdict := self._window[0].verdict) is not None:
                self._window.popleft()
                yield verdict
            else:
                self._hand_out()
                self._collect()

    def _admit(self, line: bytes) -> None:
        """Take in one request: judged before, the same as one that is under way, or new."""
        key = hashlib.blake2b(line, digest_size=16).digest()
        known = self._cache.get(key)
        job = self._pending.get(key) or _Job(line, key, replace(known, seconds=0.0) if known else None)
        self._window.append(job)
        if known is None and key not in self._pending:
            self._pending[key] = job
            self._waiting.append(job)

    def _hand_out(self) -> None:
        for slot, worker in enumerate(self._workers):
            if self._waiting and worker.ready and worker.job is None:
                if worker.process.poll() is not None:  # it died while idle: no answer's fault
                    self._replace(slot)
                else:
                    worker.send(self._waiting.popleft(), WALL * self.deadline)

    def _collect(self) -> None:
        """Wait for the next reply, death or deadline, and take in whatever has happened by then."""
        patience = min(worker.expires for worker in self._workers) - time.monotonic()
        readable = wait([worker.replies.fileno() for worker in self._workers], max(0.0, patience))
        for slot, worker in enumerate(self._workers):
            if worker.replies.fileno() in readable:
                self._read(slot)
            elif time.monotonic() > worker.expires:
                limit = f"{WALL:g} x the deadline of {self.deadline:g}" if worker.ready else f"{_STARTUP:g}"
                self._fail(slot, "timeout", f"not done in {limit} s of wall time")

    def _read(self, slot: int) -> None:
        worker = self._workers[slot]
        chunk = os.read(worker.replies.fileno(), 1 << 16)
        worker.buffer += chunk
        if not chunk:
            ending = _ending(worker.process)
            if ending == "killed by SIGPROF":
                self._fail(slot, "timeout", f"not done in the deadline of {self.deadline:g} s of CPU time")
            else:
                self._fail(slot, "error", f"its process died: {ending}")
        elif worker.buffer.endswith(b"\n"):
            reply, worker.buffer = worker.buffer, b""
            peak = 0
            if worker.job is not None:
                verdict, peak = json.loads(reply)
                self._settle(worker.job, Verdict(**verdict))
            worker.ready, worker.job, worker.expires = True, None, math.inf
            if peak > RECYCLE:
                self._replace(slot)

    def _settle(self, job: _Job, verdict: Verdict) -> None:
        job.verdict = verdict
        del self._pending[job.key]
        if is_scored(verdict):  # an error or a timeout may be the machine's fault, and is tried again
            self._cache[job.key] = verdict
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)

    def _fail(self, slot: int, status: VerdictStatus, message: str) -> None:
        worker = self._workers[slot]
        if not worker.ready:
            raise VerifierError(
                f"a process of verifier {self.name!r} does not start: {message}; what it printed is above. "
                f"Try alone: python -m megatron_rlvr.verifiers.worker {self.name!r} {self.deadline:g}"
            )
        if worker.job is not None:
            self._settle(worker.job, Verdict(0.0, status, seconds=time.monotonic() - worker.sent, message=message))
        self._replace(slot)

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = _Worker.start(self.name, self.deadline)

    def close(self) -> None:
        """End every process; calling it again does nothing."""
        for worker in self._workers:
            worker.kill()
        self._workers, self._closed = [], True

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ending(process: subprocess.Popen) -> str:
    with suppress(subprocess.TimeoutExpired):  # stdout closes a moment before the exit status is there
        process.wait(timeout=1.0)
    code: int | None = process.returncode
    if code is None:
        return "stdout closed"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
