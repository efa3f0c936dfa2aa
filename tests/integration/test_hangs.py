"""A run that stands still ends by itself in bounded time, with the stacks of all ranks: real engine and verifiers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rlvr.processes import free_port
from tests.integration.conftest import CONFIG, DEADLINE, QUICK, ROOT, logs

HANG_TIMEOUT = 60  # seconds; starting Megatron and vLLM on busy cores must stay below it
# Where rank 1 stops: the phase that it is in, and what rank 0 meanwhile waits for.
PLACES = {
    "engine": ("generate", "gather_objects"),
    "verifiers": ("verify", "gather_objects"),
    "collective": ("train", "update"),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_stands_still_ends_with_every_stack(countdown: Path, tmp_path: Path, place: str) -> None:
    phase, waits_in = PLACES[place]
    overrides = [*QUICK, "trainer.num_steps=3", f"run.dir={tmp_path}", f"run.hang_timeout={HANG_TIMEOUT}"]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    started = time.monotonic()
    process = subprocess.run(
        [*ranks, "tests/integration/hanging.py", place, CONFIG, *overrides],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    took = time.monotonic() - started
    output = process.stdout + process.stderr
    assert process.returncode == 1, output + logs((f"run.dir={tmp_path}",))
    stacks = [(tmp_path / f"logs/hang/rank_{rank}.txt").read_text() for rank in (0, 1)]
    assert f"in phase {phase!r}" in stacks[1] and "stand_still" in stacks[1]
    assert waits_in in stacks[0]
    assert f"{HANG_TIMEOUT:g} at most; the stacks of all ranks are in {tmp_path}/logs/hang" in output
    assert took < DEADLINE / 2
