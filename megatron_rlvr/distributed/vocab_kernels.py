"""The passes of vocab_passes.py as Triton kernels, for logits on a GPU: same functions, same meaning, fp32 maths.

One program takes one row of the logits, so many columns at a time, and keeps its sums in registers, so that each logit
is read once. How fast that can be is a matter of instructions as much as of memory: in the time that its memory takes
to bring a bf16 logit, an H100 issues 18 for it and an H200 12. Hence powers of two and not of e (an instruction each,
where denormal results of exp cost three more), an indicator that is multiplied with and not chosen by, and two loads in
flight where the sums leave registers for only half of the warps that a GPU can hold.

On an H100 and 32,768 x 19,008 bf16 logits a forward and a backward move 93 % of the bytes that a copy moves in the same
time. Tests run them on a GPU and under Triton's interpreter; others compile them for GPUs of three generations and
count what comes out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns and warps of a program, eight columns to a thread: 16 bytes of bf16 in one load. Of those tried on an H100 the
# fastest: for sums the short one, for the others the long one, unless it would be idle for much of a row. (The last of
# its two rounds over 4,752 columns has only 656.)
LONG = {"BLOCK": 4096, "num_warps": 16}
SHORT = {"BLOCK": 1024, "num_warps": 4}
LONG_FROM = 4 * LONG["BLOCK"]  # columns
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
UNDERFLOW = tl.constexpr(-200.0)  # 2 to it is 0 in fp32; -inf times that 0 would be NaN where the limit of p ln p is 0


def largest_and_target(logits: Tensor, targets: Tensor, start: int) -> Tensor:
    """[T, n] -> [2, T]: the largest local logit, and the target's; -inf as in vocab_passes.largest_and_target."""
    result = logits.new_empty(2, logits.shape[0], dtype=torch.float32)
    _launch(_largest_and_target, _shape(logits), logits, targets.contiguous(), start, result)
    return result


def sums(logits: Tensor, top: Tensor, floor: Tensor, target: Tensor, temperature: float) -> Tensor:
    """[5, T] local sums of vocab_passes.sums."""
    result = logits.new_empty(5, logits.shape[0], dtype=torch.float32)
    vectors = (top.contiguous(), floor.contiguous(), target.contiguous())
    _launch(_sums, SHORT, logits, *vectors, 1.0 / temperature, result)
    return result


def threshold_sum(logits: Tensor, top: Tensor, temperature: float) -> Tensor:
    """[1, T] local sum of vocab_passes.threshold_sum."""
    result = logits.new_empty(1, logits.shape[0], dtype=torch.float32)
    _launch(_threshold_sum, SHORT, logits, top.contiguous(), 1.0 / temperature, result)
    return result


def overwrite_with_gradient(
    logits: Tensor,
    top: Tensor,
    floor: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    columns: Tensor,
    entries: Tensor,
) -> None:
    """Put e (a + b t + c [kept]) in the place of each logit, ``factors`` a, b, c are [T]; then ``entries`` [T, k]."""
    vectors = (vector.contiguous() for vector in (top, floor, *factors))
    more = (columns.contiguous(), entries.contiguous(), columns.shape[1])
    _launch(_overwrite, _shape(logits), logits, *vectors, 1.0 / temperature, *more)


def _shape(logits: Tensor) -> dict[str, int]:
    return LONG if logits.shape[1] >= LONG_FROM else SHORT


def _launch(kernel: Any, shape: dict[str, int], logits: Tensor, *arguments: Tensor | float) -> None:
    """One program per row. ``logits`` may be some columns of a wider matrix."""
    rows, columns = logits.shape
    if logits.stride(1) != 1 and columns > 1:
        raise ValueError(f"the kernels read rows whose columns follow each other, not strides {logits.stride()}")
    if rows:
        kernel[(rows,)](logits, logits.stride(0), rows, columns, *arguments, **shape, enable_fp_fusion=True)


@triton.jit
def _row(logits, stride):
    """Where this program's row begins."""
    return logits + tl.program_id(0).to(tl.int64) * stride


@triton.jit
def _logits(row, columns, start, BLOCK: tl.constexpr):
    """BLOCK logits of the row as fp32, -inf behind its end; where they lie, and which are real."""
    offsets = start + tl.arange(0, BLOCK)
    real = offsets < columns
    return tl.load(row + offsets, mask=real, other=float("-inf")).to(tl.float32), row + offsets, real


@triton.jit
def _exponent(gap, scale):
    """x of 2^x = exp(gap * scale); a NaN stays one."""
    return tl.maximum(gap * (scale * LOG2_E), UNDERFLOW, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest_and_target(logits, stride, rows, columns, targets, start, result, BLOCK: tl.constexpr):
    row, place = _row(logits, stride), tl.program_id(0)
    column = tl.load(targets + place) - start
    here = (column >= 0) & (column < columns)
    tl.store(result + rows + place, tl.load(row + column, mask=here, other=float("-inf")).to(tl.float32))
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, columns, BLOCK):
        z, _, _ = _logits(row, columns, first, BLOCK)
        largest = tl.maximum(largest, z)
    tl.store(result + place, tl.max(largest, 0))


@triton.jit
def _sums(logits, stride, rows, columns, top, floor, target, scale, result, BLOCK: tl.constexpr):
    row, place = _row(logits, stride), tl.program_id(0)
    largest, least, at_target = tl.load(top + place), tl.load(floor + place), tl.load(target + place)
    kept = tl.zeros([BLOCK], tl.float32)
    dropped = tl.zeros([BLOCK], tl.float32)
    h = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    larger = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, columns, BLOCK, loop_unroll_factor=2):
        z, _, _ = _logits(row, columns, first, BLOCK)
        gap = z - largest
        exponent = _exponent(gap, scale)
        e = tl.exp2(exponent)
        is_kept = (gap >= least).to(tl.float32)
        kept += e * is_kept
        dropped += e * (1.0 - is_kept)
        h += e * exponent
        squares += e * e
        larger += (z > at_target).to(tl.float32)
    tl.store(result + place, tl.sum(kept, 0))
    tl.store(result + rows + place, tl.sum(dropped, 0))
    tl.store(result + 2 * rows + place, tl.sum(h, 0) * LN_2)
    tl.store(result + 3 * rows + place, tl.sum(squares, 0))
    tl.store(result + 4 * rows + place, tl.sum(larger, 0))


@triton.jit
def _threshold_sum(logits, stride, rows, columns, top, scale, result, BLOCK: tl.constexpr):
    row, place = _row(logits, stride), tl.program_id(0)
    largest = tl.load(top + place)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        z, _, _ = _logits(row, columns, first, BLOCK)
        total += tl.exp2(_exponent(z - largest, scale))
    tl.store(result + place, tl.sum(total, 0))


@triton.jit
def _overwrite(logits, stride, rows, columns, top, floor, a, b, c, scale, ids, entries, count, BLOCK: tl.constexpr):
    row, place = _row(logits, stride), tl.program_id(0)
    largest, least = tl.load(top + place), tl.load(floor + place)
    constant, slope, if_kept = tl.load(a + place), tl.load(b + place) * LN_2, tl.load(c + place)
    for first in range(0, columns, BLOCK):
        z, places, real = _logits(row, columns, first, BLOCK)
        gap = z - largest
        exponent = _exponent(gap, scale)
        slant = constant + slope * exponent + tl.where(gap >= least, if_kept, 0.0)
        tl.store(places, (tl.exp2(exponent) * slant).to(logits.dtype.element_ty), mask=real)
    tl.debug_barrier()  # until the other threads of this program have written their columns
    for entry in range(place * count, (place + 1) * count):
        tl.store(row + tl.load(ids + entry), tl.load(entries + entry))
