"""How a run ends: on request, killed, resumed; and what is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_rlvr.checkpoint_folder import checkpoints, step_of
from tests.integration.conftest import DEADLINE, ROOT, logs, metrics, without_times


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


def test_a_signal_stops_with_a_checkpoint_and_a_damaged_one_gives_way_to_the_one_before(
    start, train, tmp_path: Path
) -> None:
    """USR1, as Slurm sends it ahead of a time limit, reaches the ranks through the launcher."""
    folder = tmp_path / "run"
    process = start("trainer.num_steps=1000", "trainer.save_every=1", f"run.dir={folder}")
    wait_for_step(folder, 2, process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + signal.SIGUSR1, output + logs((f"run.dir={folder}",))
    before = metrics(folder)
    done = len(before)
    assert f"SIGUSR1: stopped after step {done}" in output
    assert [step_of(path) for path in checkpoints(folder)] == [done - 1, done]

    victim = next((folder / "checkpoints" / f"step_{done}" / "policy").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    output = train(f"trainer.num_steps={done + 1}", "trainer.save_every=1", f"run.dir={folder}", "run.resume=must")
    assert f"step_{done} cannot be used: policy/{victim.name} has changed since it was written" in output
    assert f"changed since the checkpoint: trainer.num_steps: 1000 -> {done + 1}" in output
    assert f"step_{done - 1} after step {done - 1}" in output
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, done + 2))
    assert without_times(rows[:done]) == without_times(before)  # step `done` was taken again, to the last bit
    assert [step_of(path) for path in checkpoints(folder)] == [done, done + 1]
    output = train("seed=1", "trainer.num_steps=99", f"run.dir={folder}", "run.resume=auto", code=2)
    assert "seed: 0 -> 1 (prompts come in another order" in output and "run.accept_changes=true" in output
    assert processes_of(tmp_path) == []


def test_a_run_that_is_killed_anywhere_goes_on_as_if_it_had_not_been(countdown) -> None:
    """A short form of `make chaos`, which kills thirty times; tools/chaos.py compares all that the runs leave."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools/chaos.py"), "--kills", "5", "--steps", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, last = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert last["equal"] is True and last["kills"] == 5
    assert {row["moment"] for row in rows if "moment" in row} == {
        "generation",
        "verification",
        "update",
        "weight sync",
        "save",
    }


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
