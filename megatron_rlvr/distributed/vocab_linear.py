"""Token statistics from hidden states and the output layer's weight, without ever holding the logits.

The logits of a few rows at a time are made, measured and dropped, and made again in the backward, where their gradient
takes their place before it is multiplied on. Beside hidden states and weight that is one block of logits, whatever the
vocabulary and however many the tokens (``platform.logits_block_elements``), for a fourth matrix product of that size.

A forward needs whole rows, for the largest logit comes first. The backward knows it, and takes tiles that are about
square: each tile is added to a part of both gradients, in fp32, and of all tiles with so many logits square ones add
least.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rlvr import platform
from megatron_rlvr.distributed import vocab_formulas, vocab_passes
from megatron_rlvr.distributed.collect import all_gather_flat
from megatron_rlvr.distributed.reduce import all_sum, sum_scatter
from megatron_rlvr.distributed.vocab import TokenStatistics, mark_detached
from megatron_rlvr.distributed.vocab_formulas import Measured, Shard, StatisticsOptions, Tokens

LEAST_ROWS = 64  # of a block, however large the vocabulary: fewer would read the weight from memory for nothing
# Columns of a tile come in multiples of so many: 16 bytes of bf16. For rows that begin elsewhere cuBLAS takes kernels
# of older GPUs (cutlass_75_..._align1): with tiles of 7,997 columns they were 42 % of an H100's step.
ALIGNED = 8
PRODUCT_ROWS = 2048  # of a matrix that a CPU makes in another dtype before it joins its own


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    logits_dtype: torch.dtype | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    min_p: float | None = None,
    tau: float | None = None,
    threshold_temperature: float = 1.0,
    top: int = 0,
    old_top: tuple[Tensor, Tensor] | None = None,
) -> TokenStatistics:
    """token_statistics of the logits ``hidden @ weight.T``, whose options these are, at ``targets`` [T] int64.

    ``weight`` [V/tp, H] is this rank's shard, its padding finite. ``hidden`` [T', H] is the same on every rank, or with
    ``sequence_parallel`` this rank's T'/tp rows of it; T' >= T, and rows behind the targets take no part. The gradient
    of ``weight`` is summed in fp32: in its ``main_grad`` (Megatron's gradient buffer) where it has one, and then
    ``weight.grad`` stays as it is; else it comes back in the dtype of the weight.

    ``logits_dtype`` is that of the blocks of logits, by default the weight's. Float32 keeps what the products of bf16
    sum to, where bf16 would round a logit near 25 to a multiple of 0.125; the gradient of the logits is rounded to the
    dtype of the weight either way.

    Collectives: forward 1 for each block of rows and 1 more in all, one more per block with ``tau`` and with ``top``;
    backward 1, the sum of the hidden states' gradient. Sequence parallelism adds one that gathers the hidden states to
    each, and takes a reduce-scatter for that sum. Raises ValueError when the shapes do not fit, ConfigError for an
    option that breaks its rule.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or targets.dim() != 1:
        shapes = f"{list(hidden.shape)}, {list(weight.shape)} and {list(targets.shape)}"
        raise ValueError(f"linear_token_statistics takes hidden [T, H], weight [V/tp, H] and targets [T], not {shapes}")
    options = StatisticsOptions(temperature, min_p, tau, threshold_temperature, top)
    shard = Shard.of(weight.shape[0], vocab_size, group)
    tokens = Tokens.of(targets, old_top, vocab_passes.maths(weight.dtype))
    dtype = logits_dtype or weight.dtype
    found = _LinearTokenStatistics.apply(hidden, weight, tokens, shard, options, sequence_parallel, dtype)
    return TokenStatistics(*found)


class _LinearTokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tokens,
        shard: Shard,
        options: StatisticsOptions,
        sequence_parallel: bool,
        logits_dtype: torch.dtype,
    ) -> tuple[Tensor | None, ...]:
        whole = _whole(hidden, shard, sequence_parallel)
        measured = [
            vocab_formulas.measure(logits, tokens.rows(rows), shard, options)
            for rows, logits in _blocks(whole, weight.detach(), shard, len(tokens.targets), logits_dtype)
        ]
        values, state = vocab_formulas.derive(Measured.join(measured), tokens, shard, options)
        ctx.save_for_backward(hidden, weight, *state, *tokens)
        ctx.shard, ctx.options = shard, options
        ctx.sequence_parallel, ctx.logits_dtype = sequence_parallel, logits_dtype
        mark_detached(ctx, values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, *saved = ctx.saved_tensors
        state, tokens, shard = vocab_formulas.State(*saved[:5]), Tokens(*saved[5:]), ctx.shard
        whole = _whole(hidden, shard, ctx.sequence_parallel)
        main_grad = getattr(weight, "main_grad", None)
        maths = vocab_passes.maths(weight.dtype)
        weight_gradient = torch.zeros_like(weight, dtype=maths) if main_grad is None else main_grad
        hidden_gradient = torch.zeros_like(whole)
        height, width = tile(len(tokens.targets), len(weight))
        buffer = whole.new_empty(height * width, dtype=ctx.logits_dtype)
        for rows in even_parts(len(tokens.targets), height):
            of_rows = tuple(None if gradient is None else gradient[rows] for gradient in upstream)
            state_of_rows = vocab_formulas.State(*(vector[rows] for vector in state))
            total = torch.zeros_like(whole[rows], dtype=maths)
            for columns in even_parts(len(weight), width):
                part, own = weight.detach()[columns], shard.part(columns)
                logits = buffer[: len(total) * len(part)].view(len(total), len(part))
                _multiply(whole[rows], part, logits)
                logits[:, own.real :] = 0.0
                vocab_formulas.overwrite_with_gradient(
                    logits[:, : own.real], tokens.rows(rows), state_of_rows, of_rows, own, ctx.options
                )
                gradient = logits.to(part.dtype)
                _add_product(total, gradient, part)
                _add_product(weight_gradient[columns], gradient.t(), whole[rows])
                del gradient  # before the next one is made: of float32 logits it is a copy
            hidden_gradient[rows] = total
            del total
        if ctx.sequence_parallel:
            hidden_gradient = sum_scatter(hidden_gradient, shard.group)
        else:
            hidden_gradient = all_sum(hidden_gradient, shard.group)
        returned = weight_gradient.to(weight.dtype) if main_grad is None else None
        return hidden_gradient, returned, None, None, None, None, None


def _whole(hidden: Tensor, shard: Shard, sequence_parallel: bool) -> Tensor:
    """[T', H] on every rank, detached."""
    if not sequence_parallel:
        return hidden.detach()
    return all_gather_flat(hidden.detach().contiguous().flatten(), shard.group).view(-1, hidden.shape[1])


def _blocks(
    hidden: Tensor, weight: Tensor, shard: Shard, tokens: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits of the real columns), at least once; the next block overwrites the one before.

    Padding is multiplied too: then every rank makes the same blocks, and rows begin where Megatron's padding puts them.
    """
    block = min(max(1, tokens), max(LEAST_ROWS, platform.logits_block_elements() // max(1, len(weight))))
    buffer = hidden.new_empty(block, len(weight), dtype=dtype)
    for part in even_parts(max(1, tokens), block):
        rows = slice(part.start, min(part.stop, tokens))
        logits = buffer[: rows.stop - rows.start]
        _multiply(hidden[rows], weight, logits)
        yield rows, logits[:, : shard.real]


def _multiply(hidden: Tensor, weight: Tensor, logits: Tensor) -> None:
    """logits = hidden @ weight.T, summed and kept in the dtype of ``logits``, which may be wider than theirs."""
    if logits.dtype == hidden.dtype:
        torch.mm(hidden, weight.t(), out=logits)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=logits.dtype, out=logits)
    else:  # a CPU's product has the dtype of its factors, which are widened a few at a time
        hidden = hidden.to(logits.dtype)
        for columns in even_parts(len(weight), PRODUCT_ROWS):
            torch.mm(hidden, weight[columns].to(logits.dtype).t(), out=logits[:, columns])


def tile(tokens: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of the largest tile of the backward, both at least 1."""
    elements = platform.logits_block_elements()
    height = max(1, min(tokens, max(math.isqrt(elements), elements // max(1, columns))))
    width = elements // height
    return height, max(1, min(columns, width - width % ALIGNED if width > ALIGNED else width))


def even_parts(total: int, most: int) -> Iterator[slice]:
    """``total`` in the fewest parts of at most ``most``, all about as large: none is left so small that it is slow.

    In multiples of ALIGNED, where ``most`` is one.
    """
    size = -(-total // max(1, -(-total // most)))
    size += -size % ALIGNED if most % ALIGNED == 0 else 0
    for start in range(0, total, max(1, size)):
        yield slice(start, min(start + size, total))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [n, H] += left [n, m] @ right [m, H], in the dtype of ``total``.

    On a CPU, whose products have the dtype of their factors, one in bf16 is rounded before it is added.
    """
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    elif right.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        for rows in even_parts(len(total), PRODUCT_ROWS):
            total[rows].add_(left[rows] @ right)
