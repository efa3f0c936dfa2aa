"""NeMo-Run's environment, as `make launcher` makes it, and the example started in it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = Path(os.environ.get("MEGATRON_RLVR_LAUNCHER", ROOT / ".venv-launcher"))
DEADLINE = 600.0  # seconds, on a machine with other work

needs_launcher = pytest.mark.skipif(not (LAUNCHER / "bin/python").exists(), reason="make launcher has not been run")


def launch(home: Path, *arguments: str, code: int = 0, **variables: str) -> str:
    """What the example prints, in one column as wide as its longest line; ``code`` is the exit code it must have."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NEMORUN_HOME": str(home), "COLUMNS": "500", **variables}
    environment["PATH"] = f"{LAUNCHER / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        [LAUNCHER / "bin/python", "examples/nemo_run/lpreg.py", "--yes", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == code, done.stdout[-3000:]
    return done.stdout
