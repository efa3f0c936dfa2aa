"""Context parallelism: a microbatch's tokens dealt out to ranks, and exchanged for heads where attention needs all.

Rank r of n holds the r-th of n equal stretches of a microbatch, whatever responses those cut through. All that looks at
one token alone (embedding, norms, MLP, logits, statistics) works on a stretch; attention swaps it for all tokens of one
n-th of the heads, and back (DeepSpeed-Ulysses, arXiv 2309.14509 Sec 3). What is gathered at the end is a few numbers a
token: from there on every rank computes the same loss of the whole microbatch, so that no loss and no method knows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rlvr.distributed.collect import all_gather_flat
from megatron_rlvr.distributed.groups import group_rank, group_size
from megatron_rlvr.distributed.vocab import DETACHED, TokenStatistics


def stretch(tokens: Tensor, multiple: int, group: ProcessGroup | None, fill: float = 0) -> Tensor:
    """[t, ...] -> this rank's [t' / n, ...], where ``fill`` rounds t up to n * multiple; all of it without a group."""
    if group is None:
        return tokens
    size = group_size(group)
    padding = [0, 0] * (tokens.dim() - 1) + [0, -len(tokens) % (size * multiple)]
    return F.pad(tokens, padding, value=fill).chunk(size)[group_rank(group)]


def gather(own: Tensor, tokens: int, group: ProcessGroup | None) -> Tensor:
    """[m, ...] of each rank -> [tokens, ...] on every rank, without padding. One collective; none in the backward.

    The gradient of the whole must be equal on every rank, for each takes its own stretch of it and adds no other's.
    """
    return (own if group is None else _Gather.apply(own, group))[:tokens]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_flat(own.detach().contiguous().flatten(), group).view(-1, *own.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream.chunk(group_size(ctx.group))[group_rank(ctx.group)], None


def gather_statistics(own: TokenStatistics, tokens: int, group: ProcessGroup | None) -> TokenStatistics:
    """Of this rank's stretch -> of the microbatch's ``tokens``, on every rank of the group. One collective.

    Three more with the most probable tokens.
    """
    if group is None:
        return own
    fields = {name: value for name, value in vars(own).items() if value is not None}
    numbers = {name: value for name, value in fields.items() if not name.startswith("top_")}
    columns = gather(torch.stack(list(numbers.values()), dim=1), tokens, group).t().contiguous()
    whole = dict(zip(numbers, columns, strict=True))
    whole |= {name: gather(value, tokens, group) for name, value in fields.items() if name not in numbers}
    return TokenStatistics(**{name: value.detach() if name in DETACHED else value for name, value in whole.items()})


def to_heads(parts: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Each [m, h, d] of this rank's tokens -> [n * m, h / n, d]: all tokens, this rank's heads. One collective.

    n must divide every h.
    """
    size, (tokens, _, width) = group_size(group), parts[0].shape
    cut = [part.view(tokens, size, -1, width).transpose(0, 1) for part in parts]
    swapped = _Exchange.apply(torch.cat(cut, dim=2), group).flatten(0, 1)
    return list(swapped.split([part.shape[2] for part in cut], dim=1))


def to_tokens(heads: Tensor, group: ProcessGroup) -> Tensor:
    """[n * m, h / n, d] -> [m, h, d]: ``to_heads`` undone. One collective."""
    cut = heads.contiguous().view(group_size(group), -1, *heads.shape[1:])
    return _Exchange.apply(cut, group).transpose(0, 1).flatten(1, 2)


def repeats(heads: int, group: ProcessGroup) -> int:
    """How often each of so many key-value heads has to come so that the group's ranks can share them out equally."""
    return math.lcm(heads, group_size(group)) // heads


class _Exchange(torch.autograd.Function):
    """[n, ...] contiguous: block r goes to rank r, whose block comes in its place. Its own inverse, and transpose."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(blocks, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return _exchange(upstream.contiguous(), ctx.group), None


def _exchange(blocks: Tensor, group: ProcessGroup) -> Tensor:
    received = torch.empty_like(blocks)
    dist.all_to_all_single(received, blocks.detach(), group=group)
    return received
