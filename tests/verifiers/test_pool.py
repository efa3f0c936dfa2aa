"""Verifier processes: deadlines, crashes, order, and that none of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_rlvr.verifiers import VerifierError
from megatron_rlvr.verifiers import pool as pool_module
from megatron_rlvr.verifiers.pool import AHEAD, RECYCLE, VerifierPool

OWN = """
import os, subprocess, sys, time
from megatron_rlvr.verdict import Verdict

ISOLATED = True

def read_answer(value):
    return value

def verify(response, answer):
    if response == "hang":
        while True:
            pass
    if response == "hang in C":
        bytes(1 << 28).find(bytes((1 << 27) - 1) + b"x")
        sorted(range(1 << 30))
    if response == "sleep":
        time.sleep(600)
    if response == "grow":
        globals().setdefault("kept", []).append(bytearray(os.urandom(1)) * (200 << 20))
    if response == "hang with a child":
        subprocess.run(["sleep", "600"])
    if response == "exit":
        os._exit(3)
    if response == "abort":
        os.abort()
    if response == "raise":
        raise KeyError("no such thing")
    if response == "leave":
        sys.exit("bye")
    if response == "memory":
        bytearray(64 << 30)
    if response == "print":
        print("{not a reply}")
    return Verdict(float(response == answer), "ok", extracted=response)
"""


@pytest.fixture
def own(tmp_path) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return str(path)


def workers() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_faults_cost_their_own_answer_only_and_order_is_kept(own, capfd):
    items = [(str(index), str(index - index % 2)) for index in range(200)]
    faults = {20: "hang", 40: "exit", 60: "abort", 80: "raise", 100: "leave", 120: "memory", 140: "print", 160: "sleep"}
    for index, fault in faults.items():
        items[index] = (fault, "x")
    started = time.monotonic()
    with VerifierPool(own, workers=2, deadline=0.5) as pool:
        verdicts = pool.score(items)
        assert len(workers()) == 2
    assert time.monotonic() - started < 60 and workers() == []
    for index, verdict in enumerate(verdicts):
        if index not in faults:
            assert (verdict.status, verdict.extracted, verdict.reward) == ("ok", str(index), float(index % 2 == 0))
    status = {fault: verdicts[index].status for index, fault in faults.items()}
    assert status == dict.fromkeys(faults.values(), "error") | {"hang": "timeout", "sleep": "timeout", "print": "ok"}
    message = {fault: verdicts[index].message for index, fault in faults.items()}
    assert "the deadline of 0.5 s of CPU time" in message["hang"] and verdicts[20].seconds >= 0.5
    assert "6 x the deadline of 0.5 s of wall time" in message["sleep"] and verdicts[160].seconds >= 3
    assert "exit code 3" in message["exit"] and "SIGABRT" in message["abort"] and "exit code 1" in message["leave"]
    assert message["raise"] == "KeyError: 'no such thing'" and "MemoryError" in message["memory"]
    assert all(verdicts[index].reward == 0.0 for index in faults)
    assert "{not a reply}" in capfd.readouterr().err


def test_long_answers_and_odd_characters_come_through(own):
    texts = ["x" * 300_000, "a\nb\r\n\0\u2028c", "\ud800 lone", "三角形 \U0001d54f", ""]
    with VerifierPool(own, workers=1, deadline=20.0) as pool:
        verdicts = pool.score([(text, text) for text in texts])
        assert [(verdict.extracted, verdict.reward) for verdict in verdicts] == [(text, 1.0) for text in texts]
        assert pool.score([]) == []


def test_a_worker_that_died_while_idle_is_replaced_and_no_answer_pays(own):
    with VerifierPool(own, workers=1, deadline=20.0) as pool:
        pool.score([("1", "1")])
        (worker,) = workers()
        worker.kill()
        deadline = time.monotonic() + 20
        while worker.status() != psutil.STATUS_ZOMBIE:  # until then it could still be handed an answer
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert [verdict.status for verdict in pool.score([("2", "1"), ("3", "1"), ("4", "1")])] == ["ok"] * 3
        assert len(workers()) == 1 and workers() != [worker]
    assert workers() == []


def test_what_an_answer_started_dies_with_it_and_a_closed_pool_says_so(own):
    with VerifierPool(own, workers=1, deadline=0.3) as pool:
        assert pool.score([("hang with a child", "")])[0].status == "timeout"  # by wall time: it computes nothing
        assert [process.name() for process in workers() if process.name() == "sleep"] == []
    with pytest.raises(VerifierError, match="closed"):
        pool.score([("1", "1")])
    pool.close()


def test_a_c_function_that_never_returns_meets_the_deadline_too(own):
    with VerifierPool(own, workers=1, deadline=0.3) as pool:
        (verdict,) = pool.score([("hang in C", "")])
    assert verdict.status == "timeout" and "CPU time" in verdict.message


def test_a_worker_that_grows_is_replaced_between_two_answers(own):
    with VerifierPool(own, workers=1, deadline=20.0) as pool:
        pool.score([("1", "1")])
        first = workers()
        assert [verdict.status for verdict in pool.score([("grow", str(index)) for index in range(4)])] == ["ok"] * 4
        assert workers() != first and len(workers()) == 1
        assert pool.score([("2", "2")])[0].reward == 1.0


def test_a_worker_is_not_taken_for_as_large_as_its_parent(own):
    held = bytearray(os.urandom(1)) * (RECYCLE + 200 << 20)  # a trainer holds gigabytes
    with VerifierPool(own, workers=1, deadline=5.0) as pool:
        first = pool._workers[0].process.pid
        assert all(verdict.reward == 1.0 for verdict in pool.score([(text, text) for text in "abc"]))
        assert pool._workers[0].process.pid == first and len(held) > RECYCLE << 20


def test_a_message_of_thousands_of_large_rows_comes_through(own):
    items = [(f"{index} " + "x" * 20_000, "y" * 20_000) for index in range(3000)]
    with VerifierPool(own, workers=2, deadline=20.0) as pool:
        verdicts = pool.score(items)
    assert [verdict.extracted for verdict in verdicts] == [response for response, _ in items]


def test_the_oldest_verdicts_are_forgotten(own, monkeypatch):
    """A run of weeks judges millions of answers."""
    monkeypatch.setattr(pool_module, "CACHED", 3)
    with VerifierPool(own, workers=1, deadline=20.0) as pool:
        pool.score([(str(index), "1") for index in range(10)])
        again = pool.score([(str(index), "1") for index in (9, 8, 7, 6)])
    assert [verdict.seconds == 0.0 for verdict in again] == [True, True, True, False]


def test_verdicts_are_kept_unless_they_are_failures(tmp_path):
    counter = tmp_path / "calls"
    path = tmp_path / "counted.py"
    path.write_text(
        "from megatron_rlvr.verdict import Verdict\nISOLATED = True\ndef read_answer(value): return value\n"
        f"def verify(response, answer):\n    open({str(counter)!r}, 'a').write(response)\n"
        "    assert response != 'e'\n    return Verdict(1.0, 'ok')\n"
    )
    with VerifierPool(str(path), workers=2, deadline=20.0) as pool:
        assert [verdict.reward for verdict in pool.score([("a", 1), ("a", 1), ("b", 1), ("a", 2)])] == [1.0] * 4
        assert sorted(counter.read_text()) == ["a", "a", "b"]  # once for each answer
        again = pool.score([("a", 1), ("e", 1)])
        assert (again[0].reward, again[0].seconds, again[1].status) == (1.0, 0.0, "error")
        pool.score([("e", 1)])
    assert sorted(counter.read_text()) == ["a", "a", "b", "e", "e"]


def test_streams_read_only_so_far_ahead(own):
    read = []

    def items():
        for index in range(5000):
            read.append(index)
            yield str(index), str(index)

    with VerifierPool(own, workers=1, deadline=20.0) as pool:
        stream = pool.stream(items())
        for index in range(3):
            assert next(stream).extracted == str(index)
        assert len(read) < 3 + 2 * AHEAD
        stream.close()
        assert workers() == []  # half-done work would answer the next call
        with pytest.raises(VerifierError, match="closed"):
            pool.score([("1", "1")])


def test_the_deadline_does_not_count_the_start_of_a_process(own):
    Path(own).write_text("import time; time.sleep(1.5)\n" + OWN)
    with VerifierPool(own, workers=1, deadline=1.0) as pool:
        assert pool.score([("1", "1")])[0].status == "ok"


def test_a_verifier_whose_process_cannot_start_stops_the_run(own, capfd):
    Path(own).write_text(f"import os\nif os.getpid() != {os.getpid()}: raise ImportError('needs foo')\n" + OWN)
    pool = VerifierPool(own, workers=1, deadline=1.0)
    with pytest.raises(VerifierError, match=r"does not start: its process died: exit code 1.*Try alone: python -m"):
        pool.score([("1", "1")])
    assert workers() == [] and "needs foo" in capfd.readouterr().err


def test_no_worker_outlives_a_killed_parent(own):
    code = (
        "import sys, psutil\nfrom megatron_rlvr.verifiers.pool import VerifierPool\n"
        f"pool = VerifierPool({own!r}, workers=2, deadline=600.0)\npool.score([('1', '1')] * 8)\n"
        "print(*(child.pid for child in psutil.Process().children()), flush=True)\n"
        "pool.score([('hang', '')] * 2)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(children) == 2
        time.sleep(0.3)  # both are inside an answer by now
        parent.send_signal(signal.SIGKILL)
        gone, alive = psutil.wait_procs(children, timeout=10)
        assert len(gone) == 2 and alive == []
    finally:
        parent.kill()
        parent.wait(timeout=10)
        parent.stdout.close()


def test_pure_verifiers_start_no_process():
    with VerifierPool("countdown", workers=4, deadline=1.0) as pool:
        assert workers() == []
        verdicts = pool.score([("2*3", {"numbers": [2, 3], "target": 6}), ("2*3", {"wrong": "answer"})])
    assert [verdict.status for verdict in verdicts] == ["ok", "error"] and "KeyError" in verdicts[1].message
    assert all(verdict.seconds > 0 for verdict in verdicts)
