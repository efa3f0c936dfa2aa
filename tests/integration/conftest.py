"""The countdown model, made once, and a way to start real runs with a deadline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_rlvr.processes import free_port

ROOT = Path(__file__).parents[2]
CONFIG = "examples/countdown_cpu/config.yaml"
QUICK = ["logging.tensorboard=false", "data.eval_path="]  # a last evaluation takes longer than three steps
TIMES = ("time/", "memory/", "tokens/per_second", "sync/seconds", "sync/proof_seconds")
DEADLINE = 600.0  # seconds; a run of a few steps takes 20 to 60 on two idle cores, several times that on busy ones


@pytest.fixture(scope="session")
def countdown() -> Path:
    """The example's data and warmed-up model; the script does nothing when they are there."""
    subprocess.run([sys.executable, "examples/countdown_cpu/prepare.py"], cwd=ROOT, check=True, timeout=DEADLINE)
    return ROOT / "examples/countdown_cpu/build"


@pytest.fixture
def start(countdown: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """start("key=value", ...) -> a launcher, ours or torchrun with that many ranks; killed where it is left over."""
    started = []

    def start_run(*overrides: str, config: str = CONFIG, torchrun: int = 0) -> subprocess.Popen:
        meeting = ["torch.distributed.run", f"--nproc-per-node={torchrun}", f"--master-port={free_port()}", "-m"]
        door = [*(meeting if torchrun else []), "megatron_rlvr.train"]
        command = [sys.executable, "-m", *door, config, *QUICK, *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        started.append(process)
        return process

    yield start_run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait(DEADLINE)


@pytest.fixture
def train(start: Callable[..., subprocess.Popen]) -> Callable[..., str]:
    """train("key=value", ..., code=0) -> the output of a run that ended with that exit code."""

    def run(*overrides: str, code: int = 0, config: str = CONFIG, torchrun: int = 0) -> str:
        process = start(*overrides, config=config, torchrun=torchrun)
        output, _ = process.communicate(timeout=DEADLINE)
        assert process.returncode == code, output + logs(overrides)
        return output

    return run


def logs(overrides: tuple[str, ...]) -> str:
    """The end of the rank logs, for a failure's message."""
    folder = next((Path(item.removeprefix("run.dir=")) for item in overrides if item.startswith("run.dir=")), None)
    if folder is None or not folder.exists():
        return ""
    return "".join(f"\n--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted((folder / "logs").glob("*.log")))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rollouts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]
