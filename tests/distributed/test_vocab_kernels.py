"""The Triton kernels give what the PyTorch passes give: on a GPU where there is one, else under Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so one test starts pytest again with it: this file, and the
suite of the token statistics, which then runs on the kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rlvr import platform
from megatron_rlvr.distributed import vocab_passes
from megatron_rlvr.distributed.vocab_formulas import passes_for

ROOT = Path(__file__).resolve().parents[2]
# Its fp32 tests; fp64 stays with the passes, and bf16 gradients the interpreter cuts off where a GPU rounds them.
SUITE = "fused_passes and dtype0 or ties or keeps_nothing or extreme or probability"
DEADLINE = 300.0  # seconds, on a machine with other work; 15 on an idle one

interpreted = pytest.mark.skipif(not platform.interprets_triton(), reason="TRITON_INTERPRET=1 is not set")
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(3, 7), (5, 4096), (2, 9001), (2, 16_389), (1, 1), (4, 0), (0, 12)]


@pytest.mark.skipif(platform.interprets_triton(), reason="this is the inner run")
def test_the_suite_of_the_statistics_passes_on_the_kernels() -> None:
    files = ["tests/distributed/test_vocab_kernels.py", "tests/distributed/test_vocab.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", f"kernels or {SUITE}"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout[-5000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) == 21, done.stdout[-2000:]


def make(rows: int, columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Some columns of a wider matrix, -inf among them, then vectors top, floor and target."""
    generator = torch.Generator().manual_seed(rows + columns)
    wide = torch.randn(rows, columns + 5, generator=generator) * 4
    wide[torch.rand(wide.shape, generator=generator) < 0.1] = -torch.inf
    logits = wide.to(dtype).to(device)[:, :columns]
    nothing = torch.zeros(rows, dtype=torch.int64, device=device)
    top = (
        vocab_passes.largest_and_target(logits, nothing, 0)[0].clamp(min=-9.0) + 0.5
    )  # another rank may hold the largest
    return logits, top, top.new_full((rows,), -4.03), top - 2.7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_kernels_equal_passes(
    rows: int, columns: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocab_passes, "FUSE_FROM", 10**6)  # compiling the passes would take longer than they do
    logits, top, floor, target = make(rows, columns, dtype, device)
    kernels = passes_for(logits)
    assert kernels is not vocab_passes
    whole = logits.double()  # of the same rounded logits
    wide = [vector.double() for vector in (top, floor, target)]
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 6 + columns, (rows,), generator=generator).to(device)  # of other ranks too
    assert kernels.largest_and_target(logits, ids, 4).equal(vocab_passes.largest_and_target(logits, ids, 4))
    pairs = [
        (kernels.sums(logits, top, floor, target, 0.8), vocab_passes.sums(whole, *wide, 0.8)),
        (kernels.threshold_sum(logits, top, 0.8), vocab_passes.threshold_sum(whole, wide[0], 0.8)),
    ]
    for found, exact in pairs:
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)

    factors = tuple(torch.randn(3, rows, generator=generator).to(device))
    behind = logits._base[:, columns:].clone()
    places = torch.randint(max(1, columns), (rows, 2 if columns else 0), generator=generator).to(device)
    entries = places.to(dtype)  # equal columns, equal entries
    doubles = tuple(each.double() for each in factors)
    vocab_passes.overwrite_with_gradient(whole, *wide[:2], doubles, 0.8, places, entries.double())
    kernels.overwrite_with_gradient(logits, top, floor, factors, 0.8, places, entries)
    close = 2e-6 if dtype == torch.float32 else 2**-7  # a whole step of bf16: the interpreter does not round
    torch.testing.assert_close(logits.double(), whole, rtol=close, atol=2e-6)
    assert logits._base[:, columns:].equal(behind)  # and nothing else was written


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_leave_fp64_to_the_passes(device: str) -> None:
    assert passes_for(torch.zeros(1, 1, dtype=torch.float64, device=device)) is vocab_passes
    transposed = torch.zeros(3, 2, device=device).t()
    with pytest.raises(ValueError, match="columns follow each other"):
        passes_for(transposed).largest_and_target(transposed, torch.zeros(2, dtype=torch.int64, device=device), 0)


def test_without_gpu_and_interpreter_the_passes_are_taken() -> None:
    if not platform.interprets_triton():
        assert passes_for(torch.zeros(1, 1)) is vocab_passes
