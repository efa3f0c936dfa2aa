"""On a GPU: this folder's suite of one rank, with the tolerances that it has on a CPU. Pytest starts again for it, for
its tests are a CPU's too and have no mark."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SUITE = "(tp1-pp1-vpp1-dp1 and not cp2) or packed_logits or float32_logits"
FILES = [f"tests/models/test_{name}.py" for name in ("critic", "invariance", "logits", "updates")]
DEADLINE = 400.0  # seconds, on a machine with other work


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_one_rank_gives_on_a_gpu_what_one_fp64_process_gives() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *FILES, "-k", SUITE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    print(done.stdout[-8000:])
    assert done.returncode == 0
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) == 8
