"""How a run ends: on request, killed, resumed; and what is left of it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import DEADLINE, logs, metrics, without_times


def wait_for_step(folder: Path, step: int, process) -> None:
    deadline = time.monotonic() + DEADLINE
    path = folder / "metrics.jsonl"
    while not (path.exists() and len(path.read_text().splitlines()) >= step):
        assert process.poll() is None, f"the run ended early{logs((f'run.dir={folder}',))}"
        assert time.monotonic() < deadline, f"no step {step} in time"
        time.sleep(0.05)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process whose command line or environment names the run's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            text = " ".join([*process.cmdline(), *process.environ().values()])
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if str(folder) in text and process.pid != os.getpid():
            found.append(process)
    return found


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def test_stopped_and_resumed_run_equals_the_uninterrupted_one(start, train, tmp_path: Path) -> None:
    """SIGTERM ends the run after its step with a checkpoint; resuming gives every later figure bit for bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train("trainer.num_steps=6", f"run.dir={whole}")
    process = start("trainer.num_steps=6", f"run.dir={cut}")
    wait_for_step(cut, 1, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + signal.SIGTERM, output + logs((f"run.dir={cut}",))
    done = len(metrics(cut))
    assert 1 <= done < 6 and f"stopped after step {done}" in output

    output = train("trainer.num_steps=6", f"run.dir={cut}", "run.resume=must")
    assert f"after step {done}" in output
    assert without_times(metrics(cut)) == without_times(metrics(whole))
    assert (cut / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    for name in ("model.safetensors", "config.json"):
        assert (cut / "hf" / name).read_bytes() == (whole / "hf" / name).read_bytes()
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize("victim", ["launcher", "rank"])
def test_nothing_outlives_a_killed_run(start, tmp_path: Path, victim: str) -> None:
    before = shared_memory()
    folder = tmp_path / "run"
    process = start("trainer.num_steps=1000", f"run.dir={folder}")
    wait_for_step(folder, 1, process)
    ranks = [item for item in psutil.Process(process.pid).children() if "RANK" in item.environ()]
    assert len(ranks) == 2
    target = psutil.Process(process.pid) if victim == "launcher" else ranks[1]
    target.kill()
    process.communicate(timeout=DEADLINE)
    assert process.returncode != 0
    deadline = time.monotonic() + 30
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(folder) == []
    assert shared_memory() - before == set()
