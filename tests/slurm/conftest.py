"""A real Slurm for the tests marked `slurm`: installed and started once per session, gone with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.conftest import countdown  # noqa: F401  a fixture of these tests too

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
NODES = 8  # a node daemon costs some 10 MB
DEADLINE = 600.0  # seconds; a run of a few steps takes one to two minutes on two busy cores

SITE = f"""
export PYTHONPATH={ROOT}
PYTHON={sys.executable}
GPU_TYPE=cpu
RANKS_PER_NODE=2
"""


@dataclass(frozen=True)
class Cluster:
    """What a user has: a shell with Slurm's commands in it."""

    folder: Path

    def submit(self, script: str, code: int = 0) -> str:
        """The number of the job that ``bash slurm/SCRIPT ...`` or ``sbatch ... slurm/SCRIPT ...`` submits."""
        output = self.shell(script, code)
        found = re.search(r"[Ss]ubmitted (?:batch )?job (\d+)", output)
        assert found, output
        return found[1]

    def shell(self, command: str, code: int | None = 0, **environment: str) -> str:
        """The output of a bash command in the repository's root; ``code`` is the exit code it must have, if any."""
        process = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env={**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "SITE": str(self.folder / "site.sh")}
            | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE,
        )
        assert code is None or process.returncode == code, process.stdout
        return process.stdout

    def job(self, number: int | str) -> dict[str, str]:
        """What Slurm knows about a job, finished ones included: {"JobState": "COMPLETED", "Restarts": "1", ...}."""
        words = self.shell(f"scontrol -o show job {number}").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: int | str, *states: str, deadline: float = DEADLINE) -> dict[str, str]:
        """Wait until the job is in one of ``states``, at the least finished; returns what Slurm knows about it."""
        states = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        end = time.monotonic() + deadline
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < end, f"job {number} is {job['JobState']} ({job.get('Reason')}), not {states}"
            time.sleep(0.2)
        return job


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two partitions, `main` and the preempting `urgent`, over nodes n1 .. n8 of 8 CPUs and 8 GPUs by name."""
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([CLUSTER, "install"], check=True, timeout=DEADLINE)
    try:
        subprocess.run([CLUSTER, "start", folder, str(NODES)], check=True, timeout=60)
        (folder / "site.sh").write_text(SITE)
        yield Cluster(folder)
    finally:
        subprocess.run([CLUSTER, "stop", folder], check=True, timeout=60)
