"""The passes of vocab_passes.py as Triton kernels, for logits on a GPU: same functions, same meaning, fp32 maths.

One program takes one row of the logits, BLOCK columns at a time, and keeps its sums in registers, so that each logit is
read once. The gradient needs nothing but its own row's numbers: there a program takes one block of one row.

These have been run under Triton's interpreter on a CPU alone (TRITON_INTERPRET=1): right, of unknown speed. Block and
warps are the usual choice for a reduction over a long row, not a measured one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns that a program holds at a time: 16 KiB of fp32 in the registers of 8 warps
WARPS = 8


def maximum(logits: Tensor) -> Tensor:
    """[T, n] -> [T] largest local logit; -inf where there is no column."""
    result = logits.new_empty(logits.shape[0], dtype=torch.float32)
    _launch(_maximum, logits, result)
    return result


def sums(logits: Tensor, top: Tensor, floor: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """[5, T] local sums of vocab_passes.sums."""
    result = logits.new_empty(5, logits.shape[0], dtype=torch.float32)
    _launch(_sums, logits, top.contiguous(), floor.contiguous(), target.contiguous(), scale, result)
    return result


def threshold_sum(logits: Tensor, top: Tensor, scale: Tensor) -> Tensor:
    """[1, T] local sum of vocab_passes.threshold_sum."""
    result = logits.new_empty(1, logits.shape[0], dtype=torch.float32)
    _launch(_threshold_sum, logits, top.contiguous(), scale, result)
    return result


def overwrite_with_gradient(
    logits: Tensor, top: Tensor, floor: Tensor, factors: tuple[Tensor, Tensor, Tensor], scale: Tensor
) -> None:
    """Put e (a + b t + c [kept]) in the place of each logit; ``factors`` a, b, c are [T]."""
    vectors = [vector.contiguous() for vector in (top, floor, *factors)]
    _launch(_overwrite, logits, *vectors, scale, blocks=triton.cdiv(logits.shape[1], BLOCK))


def _launch(kernel: Any, logits: Tensor, *arguments: Tensor, blocks: int = 1) -> None:
    """One program per row, or per block of one. ``logits`` may be some columns of a wider matrix."""
    rows, columns = logits.shape
    if logits.stride(1) != 1 and columns > 1:
        raise ValueError(f"the kernels read rows whose columns follow each other, not strides {logits.stride()}")
    if rows and blocks:
        block = min(BLOCK, triton.next_power_of_2(max(1, columns)))
        kernel[(rows, blocks)](logits, logits.stride(0), rows, columns, *arguments, BLOCK=block, num_warps=WARPS)


@triton.jit
def _logits(logits, stride, columns, start, BLOCK: tl.constexpr):
    """BLOCK logits of this program's row as fp32, -inf behind its end; where they lie, and which are real."""
    offsets = start + tl.arange(0, BLOCK)
    places = logits + tl.program_id(0).to(tl.int64) * stride + offsets
    real = offsets < columns
    return tl.load(places, mask=real, other=float("-inf")).to(tl.float32), places, real


@triton.jit
def _finite(t):
    return tl.where(t == float("-inf"), 0.0, t)


@triton.jit
def _maximum(logits, stride, rows, columns, result, BLOCK: tl.constexpr):
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        z, _, _ = _logits(logits, stride, columns, start, BLOCK)
        largest = tl.maximum(largest, z)
    tl.store(result + tl.program_id(0), tl.max(largest, 0))


@triton.jit
def _sums(logits, stride, rows, columns, top, floor, target, scale, result, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    largest, least, at_target = tl.load(top + row), tl.load(floor + row), tl.load(target + row)
    inverse_temperature, inverse_threshold = tl.load(scale), tl.load(scale + 1)
    kept = tl.zeros([BLOCK], tl.float32)
    dropped = tl.zeros([BLOCK], tl.float32)
    h = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    larger = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        z, _, _ = _logits(logits, stride, columns, start, BLOCK)
        gap = z - largest
        t = gap * inverse_temperature
        e = tl.exp(t)
        is_kept = gap * inverse_threshold >= least
        kept += tl.where(is_kept, e, 0.0)
        dropped += tl.where(is_kept, 0.0, e)
        h += e * _finite(t)
        squares += e * e
        larger += tl.where(z > at_target, 1.0, 0.0)
    tl.store(result + row, tl.sum(kept, 0))
    tl.store(result + rows + row, tl.sum(dropped, 0))
    tl.store(result + 2 * rows + row, tl.sum(h, 0))
    tl.store(result + 3 * rows + row, tl.sum(squares, 0))
    tl.store(result + 4 * rows + row, tl.sum(larger, 0))


@triton.jit
def _threshold_sum(logits, stride, rows, columns, top, scale, result, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    largest, inverse_threshold = tl.load(top + row), tl.load(scale + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        z, _, _ = _logits(logits, stride, columns, start, BLOCK)
        total += tl.exp((z - largest) * inverse_threshold)
    tl.store(result + row, tl.sum(total, 0))


@triton.jit
def _overwrite(logits, stride, rows, columns, top, floor, a, b, c, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    z, places, real = _logits(logits, stride, columns, tl.program_id(1) * BLOCK, BLOCK)
    gap = z - tl.load(top + row)
    t = gap * tl.load(scale)
    is_kept = gap * tl.load(scale + 1) >= tl.load(floor + row)
    factor = tl.load(a + row) + tl.load(b + row) * _finite(t) + tl.where(is_kept, tl.load(c + row), 0.0)
    tl.store(places, (tl.exp(t) * factor).to(logits.dtype.element_ty), mask=real)
