"""The passes of vocab_passes.py as Triton kernels, for logits on a GPU: same functions, same meaning, fp32 maths.

One program takes one row of the logits, BLOCK columns at a time, and keeps its sums in registers, so that each logit is
read once. How fast that can be is a matter of instructions as much as of memory: in the time that its memory takes to
bring a bf16 logit, an H100 issues 18 for it and an H200 12. Hence powers of two and not of e (an instruction each,
where denormal results of exp cost three more), an indicator that is multiplied with and not chosen by, and one program
of four warps with eight columns to a thread, so that registers leave room for half of the warps that a GPU can hold.

Compiled for GPUs of three generations, read and counted by tests, run under Triton's interpreter on a CPU; never timed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns that a program holds at a time: eight to a thread, 16 bytes of bf16 in one load
WARPS = 4
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
UNDERFLOW = tl.constexpr(-200.0)  # 2 to it is 0 in fp32; -inf times that 0 would be NaN where the limit of p ln p is 0


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
    _launch(_overwrite, logits, *(vector.contiguous() for vector in (top, floor, *factors)), scale)


def _launch(kernel: Any, logits: Tensor, *arguments: Tensor) -> None:
    """One program per row. ``logits`` may be some columns of a wider matrix."""
    rows, columns = logits.shape
    if logits.stride(1) != 1 and columns > 1:
        raise ValueError(f"the kernels read rows whose columns follow each other, not strides {logits.stride()}")
    if rows:
        options = {"BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": True}
        kernel[(rows,)](logits, logits.stride(0), rows, columns, *arguments, **options)


@triton.jit
def _logits(logits, stride, columns, start, BLOCK: tl.constexpr):
    """BLOCK logits of this program's row as fp32, -inf behind its end; where they lie, and which are real."""
    offsets = start + tl.arange(0, BLOCK)
    places = logits + tl.program_id(0).to(tl.int64) * stride + offsets
    real = offsets < columns
    return tl.load(places, mask=real, other=float("-inf")).to(tl.float32), places, real


@triton.jit
def _exponent(gap, scale):
    """x of 2^x = exp(gap * scale); a NaN stays one."""
    return tl.maximum(gap * (scale * LOG2_E), UNDERFLOW, propagate_nan=tl.PropagateNan.ALL)


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
    factor = tl.load(scale)
    kept = tl.zeros([BLOCK], tl.float32)
    dropped = tl.zeros([BLOCK], tl.float32)
    h = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    larger = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        z, _, _ = _logits(logits, stride, columns, start, BLOCK)
        gap = z - largest
        exponent = _exponent(gap, factor)
        e = tl.exp2(exponent)
        is_kept = (gap >= least).to(tl.float32)
        kept += e * is_kept
        dropped += e * (1.0 - is_kept)
        h += e * exponent
        squares += e * e
        larger += (z > at_target).to(tl.float32)
    tl.store(result + row, tl.sum(kept, 0))
    tl.store(result + rows + row, tl.sum(dropped, 0))
    tl.store(result + 2 * rows + row, tl.sum(h, 0) * LN_2)
    tl.store(result + 3 * rows + row, tl.sum(squares, 0))
    tl.store(result + 4 * rows + row, tl.sum(larger, 0))


@triton.jit
def _threshold_sum(logits, stride, rows, columns, top, scale, result, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    largest, factor = tl.load(top + row), tl.load(scale)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        z, _, _ = _logits(logits, stride, columns, start, BLOCK)
        total += tl.exp2(_exponent(z - largest, factor))
    tl.store(result + row, tl.sum(total, 0))


@triton.jit
def _overwrite(logits, stride, rows, columns, top, floor, a, b, c, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    largest, least, factor = tl.load(top + row), tl.load(floor + row), tl.load(scale)
    constant, slope, if_kept = tl.load(a + row), tl.load(b + row) * LN_2, tl.load(c + row)
    for start in range(0, columns, BLOCK):
        z, places, real = _logits(logits, stride, columns, start, BLOCK)
        gap = z - largest
        exponent = _exponent(gap, factor)
        slant = constant + slope * exponent + tl.where(gap >= least, if_kept, 0.0)
        tl.store(places, (tl.exp2(exponent) * slant).to(logits.dtype.element_ty), mask=real)
