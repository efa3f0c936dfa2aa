"""Verifier processes with a hard deadline per answer.

A verifier that computes forever or crashes costs its own answer and nothing else: the process is killed, replaced, and
the answer's status says so. The processes are fresh interpreters, not forks of one that holds Megatron and vLLM.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

from megatron_rlvr.verdict import Verdict
from megatron_rlvr.verifiers import VerifierError, judge, load

_STARTUP = 120.0  # seconds until a process is ready; importing sympy takes about one
_ROOT = str(Path(__file__).resolve().parents[2])


@dataclass
class _Worker:
    process: subprocess.Popen
    requests: IO[bytes]
    replies: IO[bytes]
    expires: float  # time.monotonic() at which it is killed; inf while it idles
    ready: bool = False
    job: int | None = None  # index of the answer that it works on
    buffer: bytes = b""

    @classmethod
    def start(cls, name: str) -> _Worker:
        path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "megatron_rlvr.verifiers.worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C reaches the trainer only, and the group can be killed as a whole
        )
        assert process.stdin is not None and process.stdout is not None  # both are pipes
        return cls(process, process.stdin, process.stdout, time.monotonic() + _STARTUP)

    def send(self, job: int, item: tuple[str, Any], deadline: float) -> None:
        self.job, self.expires = job, time.monotonic() + deadline
        with suppress(BrokenPipeError):  # it died just now: the end of its stdout says so next
            self.requests.write(json.dumps(item).encode() + b"\n")
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
    thread that started it. ``deadline`` is in seconds of wall time per answer.
    """

    def __init__(self, name: str, workers: int, deadline: float) -> None:
        self.name, self.deadline = name, deadline
        self._verifier = load(name)
        self._workers = [_Worker.start(name) for _ in range(workers)] if self._verifier.ISOLATED else []
        self._closed = False

    def score(self, items: Sequence[tuple[str, Any]]) -> list[Verdict]:
        """The verdicts of (response, answer) pairs, in their order.

        Raises VerifierError where a worker process cannot start.
        """
        if self._closed:
            raise VerifierError(f"the {self.name} verifier pool is closed")
        if not self._verifier.ISOLATED:
            return [judge(self._verifier, response, answer) for response, answer in items]
        verdicts: dict[int, Verdict] = {}
        waiting = deque(range(len(items)))
        try:
            while len(verdicts) < len(items):
                self._hand_out(waiting, items)
                self._collect(verdicts)
        except BaseException:  # half-done work would answer the next call
            self.close()
            raise
        return [verdicts[index] for index in range(len(items))]

    def _hand_out(self, waiting: deque[int], items: Sequence[tuple[str, Any]]) -> None:
        for slot, worker in enumerate(self._workers):
            if waiting and worker.ready and worker.job is None:
                if worker.process.poll() is not None:  # it died while idle: no answer's fault
                    self._replace(slot)
                else:
                    job = waiting.popleft()
                    worker.send(job, items[job], self.deadline)

    def _collect(self, verdicts: dict[int, Verdict]) -> None:
        """Wait for the next reply, death or deadline, and take in whatever has happened by then."""
        patience = min(worker.expires for worker in self._workers) - time.monotonic()
        readable = wait([worker.replies.fileno() for worker in self._workers], max(0.0, patience))
        for slot, worker in enumerate(self._workers):
            if worker.replies.fileno() in readable:
                self._read(slot, verdicts)
            elif time.monotonic() > worker.expires:
                limit = f"reward.deadline={self.deadline:g}" if worker.ready else f"{_STARTUP:g}"
                verdict = Verdict(0.0, "timeout", seconds=self.deadline, message=f"not done in {limit} s")
                self._fail(slot, verdict, verdicts)

    def _read(self, slot: int, verdicts: dict[int, Verdict]) -> None:
        worker = self._workers[slot]
        chunk = os.read(worker.replies.fileno(), 1 << 16)
        worker.buffer += chunk
        if not chunk:
            self._fail(slot, Verdict(0.0, "error", message=f"its process died: {_ending(worker.process)}"), verdicts)
        elif worker.buffer.endswith(b"\n"):
            if worker.job is not None:
                verdicts[worker.job] = Verdict(**json.loads(worker.buffer))
            worker.ready, worker.job, worker.expires, worker.buffer = True, None, math.inf, b""

    def _fail(self, slot: int, verdict: Verdict, verdicts: dict[int, Verdict]) -> None:
        worker = self._workers[slot]
        if not worker.ready:
            raise VerifierError(
                f"a process of verifier {self.name!r} does not start: {verdict.message}; what it printed is above. "
                f"Try alone: python -m megatron_rlvr.verifiers.worker {self.name}"
            )
        if worker.job is not None:
            verdicts[worker.job] = verdict
        self._replace(slot)

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = _Worker.start(self.name)

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
