"""A file through the verifier, as the command runs it: order, resume, and one clear error for each mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rlvr.config import ConfigError
from megatron_rlvr.verify_file import verify_file

ROOT = Path(__file__).resolve().parents[1]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools/verify.py"), *map(str, arguments)]


ROWS = [{"response": rf"so \boxed{{{index % 7}}}", "answer": index % 5, "id": index} for index in range(300)]


def test_rows_gain_their_verdicts_in_order(tmp_path):
    source, target = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    seen, there = [], []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        there.append(target.read_text().count("\n") if target.exists() else 0)

    counts = verify_file(source, target, "math", workers=2, deadline=20.0, progress=progress)
    rows = read(target)
    assert there == list(range(301))  # what is done is on the disk, whatever ends the process next
    assert counts == {"ok": 300} and seen == [(index, 300) for index in range(301)]
    assert [{key: row[key] for key in ("response", "answer", "id")} for row in rows] == ROWS
    assert [row["reward"] for row in rows] == [float(row["id"] % 7 == row["id"] % 5) for row in ROWS]
    assert all(row["status"] == "ok" and row["extracted"] == str(row["id"] % 7) for row in rows)
    assert all(row["right"] is (row["reward"] == 1.0) for row in rows)
    assert all(row["seconds"] >= 0 and row["verifier"] == "math" for row in rows)


def test_a_killed_run_goes_on_behind_the_last_whole_row(tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\nfrom megatron_rlvr.verdict import Verdict\nISOLATED = True\n"
        "def read_answer(value): return value\n"
        "def verify(response, answer):\n    time.sleep(0.02)\n    return Verdict(1.0, 'ok', str(answer))\n"
    )
    rows = [{"response": "r", "answer": index} for index in range(200)]
    source, target = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    run = command(source, target, "--verifier", slow, "--workers", 1)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(run, env=environment, stderr=subprocess.DEVNULL)
    started = time.monotonic()
    while not target.exists() or target.stat().st_size < 3000:
        assert time.monotonic() - started < 120 and killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=10)
    before = target.read_bytes()
    kept = before[: before.rindex(b"\n") + 1]
    assert 0 < kept.count(b"\n") < 200
    target.write_bytes(kept + b'{"response": "r", "ans')  # as a full disk or a killed writer leaves it
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "200 rows, 200 ok" in done.stdout, done.stderr
    assert target.read_bytes().startswith(kept) and [row["extracted"] for row in read(target)] == [
        str(i) for i in range(200)
    ]
    again = target.read_bytes()
    assert subprocess.run(run, env=environment, capture_output=True, timeout=60).returncode == 0
    assert target.read_bytes() == again


def test_a_file_of_an_earlier_version_is_gone_on_with(tmp_path):
    source, target = write(tmp_path / "in.jsonl", ROWS[:6]), tmp_path / "out.jsonl"
    verify_file(source, target, "dapo", workers=1, deadline=1.0)
    earlier = [{name: value for name, value in row.items() if name != "right"} for row in read(target)]
    write(target, earlier[:3])
    assert verify_file(source, target, "dapo", workers=1, deadline=1.0).total() == 6
    assert read(target)[:3] == earlier[:3] and "right" in read(target)[3]


def test_an_output_of_something_else_is_left_alone(tmp_path):
    source, target = write(tmp_path / "in.jsonl", ROWS[:5]), tmp_path / "out.jsonl"
    verify_file(source, target, "dapo", workers=1, deadline=1.0)
    before = target.read_bytes()
    for other, verifier in (
        (ROWS[:5], "gsm8k"),
        (ROWS[5:], "dapo"),
        (ROWS[:3], "dapo"),
        ([{**ROWS[0], "id": 9}], "dapo"),
    ):
        with pytest.raises(ConfigError, match="out.jsonl is in the way: its row .* remove it to start again"):
            verify_file(write(source, other), target, verifier, workers=1, deadline=1.0)
        assert target.read_bytes() == before


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 3 is no JSON"),
        ("[1]", "line 3 must hold an object with response and answer"),
        ('{"answer": 1}', "line 3 has no response, but answer"),
        ('{"response": "x"}', "line 3 has no answer, but response"),
        ('{"response": 5, "answer": 1}', "line 3: response must be text, not 5"),
        (
            '{"response": "x", "answer": [1]}',
            "line 3: the verifier cannot take the answer: must be text or a number, not ",
        ),
    ],
)
def test_a_bad_row_is_named_before_anything_is_scored(tmp_path, line, message):
    source, target = write(tmp_path / "in.jsonl", ROWS[:1]), tmp_path / "out.jsonl"
    source.write_text(source.read_text() + "\n" + line + "\n")  # blank lines count, as in an editor
    with pytest.raises(ConfigError, match=message):
        verify_file(source, target, "math", workers=1, deadline=1.0)
    assert not target.exists()


def test_a_verifier_of_ones_own_that_fails_on_an_answer_is_named(tmp_path):
    (tmp_path / "own.py").write_text("ISOLATED = False\nread_answer = lambda value: value['gold']\nverify = None\n")
    source = write(tmp_path / "in.jsonl", [{"response": "x", "answer": "text"}])
    with pytest.raises(ConfigError, match=r"in.jsonl line 1: read_answer failed with TypeError: string indices"):
        verify_file(source, tmp_path / "out.jsonl", str(tmp_path / "own.py"), workers=1, deadline=1.0)


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    source, empty = write(tmp_path / "in.jsonl", ROWS[:2]), write(tmp_path / "empty.jsonl", [])
    for arguments, message in (
        ((tmp_path / "absent.jsonl", "--verifier", "math"), "no such file"),
        ((source, "--verifier", "mth"), "did you mean 'math'"),
        ((empty, "--verifier", "math"), "holds no row"),
        ((source, "--verifier", "math", "--workers", 0), "--workers must be at least 1"),
        ((source, "--verifier", "math", "--deadline", 0), "--deadline must be above 0"),
    ):
        run = command(arguments[0], tmp_path / "out.jsonl", *arguments[1:])
        done = subprocess.run(
            run, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        errors = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
        assert done.returncode == 1 and len(errors) == 1 and message in errors[0], done.stderr
        assert "Traceback" not in done.stderr
