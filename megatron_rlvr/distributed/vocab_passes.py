"""The passes over [T, V/tp] logits behind the token statistics; nothing here talks to another rank.

A pass is one expression over the whole matrix. For real vocabularies torch.compile fuses it into a single loop: each
logit is read once and no matrix beside the logits exists. Where nothing can compile, or the vocabulary is so small that
it would not pay, the same expression runs over blocks of rows that fit the cache: some times slower, no more memory.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_rlvr import platform

log = logging.getLogger(__name__)

R = TypeVar("R")

# Local columns; compiling takes seconds, which a smaller vocabulary never earns back. vocab_linear.py cuts a larger one
# into tiles that are hardly narrower than this.
FUSE_FROM = 2048
SPAN = 16384  # columns summed in one go: fp32 loses a digit over the 150,000 of a whole vocabulary


def maths(dtype: torch.dtype) -> torch.dtype:
    """What is computed in, for logits of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def largest_and_target(logits: Tensor, targets: Tensor, start: int) -> Tensor:
    """[T, n] -> [2, T] in the dtype of the maths: the largest local logit, and the target's.

    -inf where there is no column, and where the target is none of those from id ``start`` on.
    """
    at_target = logits_at(logits, targets[:, None], start)[:, 0]
    if logits.shape[1] == 0:
        return torch.stack([at_target, at_target])
    return torch.stack([logits.amax(dim=1).to(at_target.dtype), at_target])


def logits_at(logits: Tensor, ids: Tensor, start: int) -> Tensor:
    """[T, k] ids -> [T, k]: the logit where the id is this rank's, -inf elsewhere, in the dtype of the maths."""
    if logits.shape[1] == 0:
        return logits.new_full(ids.shape, -torch.inf, dtype=maths(logits.dtype))
    owned, column = own(ids, start, logits.shape[1])
    return torch.where(owned, logits.gather(1, column), -torch.inf).to(maths(logits.dtype))


def own(ids: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Whether each id is one of so many from ``start`` on, and which one it is (any, where it is not)."""
    column = ids - start
    return (column >= 0) & (column < columns), column.clamp(0, max(0, columns - 1))


def inverse(temperature: float, like: Tensor) -> Tensor:
    """[] what a gap is multiplied with. A tensor, for a compiled loop would be compiled anew for every number."""
    return like.new_full((), 1.0 / temperature)


def sums(logits: Tensor, top: Tensor, floor: Tensor, target: Tensor, temperature: float) -> Tensor:
    """[5, T] local sums, with t = (z - top) / temperature and e = exp t: e kept, e dropped, e t, e^2, [z > target].

    top, floor, target: [T] maximum over all ranks, least z - top that is kept, target's logit.
    """
    return _over_spans(_sums, logits, (top, floor, target), inverse(temperature, top))


def threshold_sum(logits: Tensor, top: Tensor, temperature: float) -> Tensor:
    """[1, T] local sum of exp((z - top) / temperature), what a fixed threshold is measured against."""
    return _over_spans(_threshold_sum, logits, (top,), inverse(temperature, top))


def overwrite_with_gradient(
    logits: Tensor,
    top: Tensor,
    floor: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    columns: Tensor,
    entries: Tensor,
) -> None:
    """Put e (a + b t + c [kept]) in the place of each logit; ``factors`` a, b, c are [T].

    Then ``entries`` [T, k] into these ``columns`` [T, k] of their rows, where equal columns have equal entries.
    """
    _by_rows(_overwrite, logits, (top, floor, *factors), inverse(temperature, top))
    # not scatter_: on a CPU that one copies a whole bf16 matrix
    logits[torch.arange(len(logits), device=logits.device)[:, None], columns] = entries


def _sums(logits: Tensor, top: Tensor, floor: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    z = logits.to(top.dtype)
    gap = z - top[:, None]
    t = gap * scale
    e = t.exp()
    kept = torch.where(gap >= floor[:, None], e, 0.0)
    # e - kept is e or exactly 0: the dropped mass is summed by itself, for a difference of sums would cancel
    parts = [kept, e - kept, e * _finite(t), e * e, torch.where(z > target[:, None], 1.0, 0.0)]
    return torch.stack([part.sum(1) for part in parts])


def _threshold_sum(logits: Tensor, top: Tensor, scale: Tensor) -> Tensor:
    return ((logits.to(top.dtype) - top[:, None]) * scale).exp().sum(1)[None]


def _overwrite(logits: Tensor, top: Tensor, floor: Tensor, a: Tensor, b: Tensor, c: Tensor, scale: Tensor) -> None:
    gap = logits.to(top.dtype) - top[:, None]
    t = gap * scale
    factor = a[:, None] + b[:, None] * _finite(t) + torch.where(gap >= floor[:, None], c[:, None], 0.0)
    logits.copy_(t.exp() * factor)


def _finite(t: Tensor) -> Tensor:
    """0 in place of -inf: there p is 0, and 0 * -inf would be NaN where the limit of p ln p is 0."""
    return torch.where(t == -torch.inf, 0.0, t)


def _over_spans(
    expression: Callable[..., Tensor], logits: Tensor, vectors: tuple[Tensor, ...], scale: Tensor
) -> Tensor:
    """The [k, T] sums that ``expression`` takes over columns, from those over spans of them."""
    starts = range(0, max(1, logits.shape[1]), SPAN)
    spans = [_by_rows(expression, logits[:, start : start + SPAN], vectors, scale) for start in starts]
    return torch.stack([torch.cat(blocks, dim=1) for blocks in spans]).sum(0)


def _by_rows(expression: Callable[..., R], logits: Tensor, vectors: tuple[Tensor, ...], scale: Tensor) -> list[R]:
    """What ``expression`` makes of the matrix and its row vectors, for each block of rows."""
    run = _fused(expression) if _fuses(logits) else expression
    return [run(logits[rows], *(vector[rows] for vector in vectors), scale) for rows in _row_blocks(logits)]


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    """Blocks of rows for an unfused pass; one block for a fused one. At least one, be it empty."""
    rows, columns = logits.shape
    block = max(1, rows) if _fuses(logits) else max(1, platform.block_elements() // max(1, columns))
    for start in range(0, max(1, rows), block):
        yield slice(start, start + block)


def _fuses(logits: Tensor) -> bool:
    return logits.shape[1] >= FUSE_FROM and logits.shape[0] > 0 and can_fuse()


@functools.cache
def _fused(expression: Callable) -> Callable:
    return torch.compile(expression, dynamic=True)


def fused_on_gpu(function: Callable[..., R]) -> Callable[..., R]:
    """``function`` of row vectors; where the first of them is on a GPU, compiled to a kernel or two.

    Some dozens of operations would take longer to launch than to run.
    """

    @functools.wraps(function)
    def run(first: Tensor, *others: Any) -> R:
        return (_fused(function) if on_triton(first) else function)(first, *others)

    return run


def on_triton(tensor: Tensor) -> bool:
    """Whether it is on a GPU for which Triton makes kernels."""
    return tensor.is_cuda and platform.has_triton()


@functools.cache
def can_fuse() -> bool:
    """Whether torch.compile finds what it needs here; says so once where it does not."""
    if platform.has_gpu() or shutil.which(os.environ.get("CXX", "g++")):
        return True
    log.warning("no C++ compiler (g++, or the one CXX names): token statistics run unfused, several times slower")
    return False
