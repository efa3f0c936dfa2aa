"""Between logits and statistics: what is summed over the columns, what follows from the sums, and the way back.

Written for any block of rows, so that vocab.py, which has all logits, and vocab_linear.py, which makes those of a few
rows at a time, share every formula. With t = (z - max z) / temperature and e = exp t:

    s = sum e        kept, dropped: its parts on either side of the threshold        h = sum e t
    log_prob = t[target] - ln s        entropy = ln s - h / s        ln Z = ln(kept / s)
    KL(q_old || p) = ln s - sum q_old (t - ln q_old), over the old policy's kept tokens

"p_v >= min_p * max p" at a temperature of its own reads z_v - max z >= temperature * ln min_p and needs no normaliser,
so the kept mass is one more sum beside the softmax's own, in the same collective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rlvr import platform
from megatron_rlvr.config import rule
from megatron_rlvr.distributed import vocab_passes
from megatron_rlvr.distributed.collect import all_gather_flat
from megatron_rlvr.distributed.groups import group_rank, group_size
from megatron_rlvr.distributed.reduce import all_max, all_sum


@dataclass(frozen=True)
class StatisticsOptions:
    """What the statistics are of: p = softmax(logits / temperature), and which tokens the proxy keeps.

    With p at ``threshold_temperature``, ``min_p`` keeps p >= min_p * max p and ``tau`` keeps p >= tau; ties stay.
    ``top`` asks for that many of the most probable kept tokens.
    """

    temperature: float = 1.0
    min_p: float | None = None
    tau: float | None = None
    threshold_temperature: float = 1.0
    top: int = 0

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("threshold_temperature", self.threshold_temperature)):
            rule(value > 0, f"{name} must be above 0, not {value}: logits are divided by it")
        for name, share in (("min_p", self.min_p), ("tau", self.tau)):
            why = "it is compared with a probability; null is no threshold"
            rule(share is None or 0 < share <= 1, f"{name} must be in (0, 1], not {share}: {why}")
        rule(
            self.min_p is None or self.tau is None,
            f"min_p={self.min_p} and tau={self.tau} are both set, but a proxy has one threshold: set one to null",
        )
        rule(self.top >= 0, f"top must be at least 0, not {self.top}: it is a number of tokens")


@dataclass(frozen=True)
class Shard:
    """This rank's columns of the vocabulary."""

    start: int  # vocabulary id of the first one
    real: int  # those that are not padding; they come first
    group: ProcessGroup | None

    @staticmethod
    def of(columns: int, vocab_size: int | None, group: ProcessGroup | None) -> Shard:
        """Raises ValueError when the vocabulary has more tokens than all ranks have columns."""
        start, total = group_rank(group) * columns, group_size(group) * columns
        if vocab_size is not None and vocab_size > total:
            raise ValueError(f"vocab_size={vocab_size} is more than the {total} columns of all ranks together")
        return Shard(start, min(columns, max(0, (total if vocab_size is None else vocab_size) - start)), group)

    def part(self, columns: slice) -> Shard:
        """These of the columns alone."""
        real = max(0, min(columns.stop, self.real) - columns.start)
        return Shard(self.start + columns.start, real, self.group)


class Tokens(NamedTuple):
    """The vocabulary entries that a row is asked about: the target, and the old policy's kept set (K = 0: none)."""

    targets: Tensor  # [T]
    old_ids: Tensor  # [T, K]
    old_q: Tensor  # [T, K] their probabilities, which sum to 1, or to 0 where nothing was kept

    @staticmethod
    def of(targets: Tensor, old_top: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> Tokens:
        """``old_top``: ids [T, K] and log-probs [T, K], which are renormalised."""
        if old_top is None:
            nothing = targets.new_empty(len(targets), 0)
            return Tokens(targets, nothing, nothing.to(dtype))
        ids, log_probs = old_top
        total = log_probs.to(dtype).logsumexp(1, keepdim=True)
        return Tokens(targets, ids, torch.where(total > -torch.inf, (log_probs - total).exp(), 0.0))

    def ids(self) -> Tensor:
        """[T, 1 + K]"""
        return torch.cat([self.targets[:, None], self.old_ids], dim=1)

    def rows(self, rows: slice) -> Tokens:
        return Tokens(*(tensor[rows] for tensor in self))


class Measured(NamedTuple):
    """What a block of rows gives before the one SUM over the ranks; each [..., T]."""

    largest: Tensor  # [T] logit over all ranks
    target_gap: Tensor  # [T] target's logit less the largest
    floor: Tensor  # [T] least gap to the largest logit that the threshold keeps
    # [5, T] over this rank's columns: e kept, e dropped, e t, e^2, [z > target]; and with an old policy's kept set a
    # sixth, of q_old (t - ln q_old)
    sums: Tensor
    top_ids: Tensor  # [top + 1, T], or [0, T]
    top_gaps: Tensor  # [top + 1, T] or [0, T]: their logits less the largest

    @staticmethod
    def join(blocks: list[Measured]) -> Measured:
        return Measured(*(torch.cat(parts, dim=-1) for parts in zip(*blocks, strict=True)))


class State(NamedTuple):
    """[T] each, equal on every rank: what the backward needs beside the logits."""

    largest: Tensor
    floor: Tensor
    s: Tensor
    kept: Tensor
    entropy: Tensor


def passes_for(logits: Tensor) -> ModuleType:
    """vocab_kernels for logits on a GPU, or where Triton is interpreted; vocab_passes for others, and for fp64."""
    runs_kernels = platform.interprets_triton() or vocab_passes.on_triton(logits)
    if logits.dtype == torch.float64 or not runs_kernels:
        return vocab_passes
    from megatron_rlvr.distributed import vocab_kernels  # Triton is not everywhere

    return vocab_kernels


def measure(real: Tensor, tokens: Tokens, shard: Shard, options: StatisticsOptions) -> Measured:
    """``real`` [T, n]: logits of this rank's real columns. One collective, one more for ``tau``, one for ``top``."""
    passes = passes_for(real)
    largest, target = all_max(passes.largest_and_target(real, tokens.targets, shard.start), shard.group)
    if options.tau is not None:
        normaliser = all_sum(passes.threshold_sum(real, largest, options.threshold_temperature), shard.group)[0]
        floor = (math.log(options.tau) + normaliser.log()) * options.threshold_temperature
    else:
        # no threshold at all is a floor that nothing falls below
        least = -math.inf if options.min_p is None else math.log(options.min_p)
        floor = torch.full_like(largest, least * options.threshold_temperature)
    sums = passes.sums(real, largest, floor, target, options.temperature)
    if tokens.old_ids.shape[1]:
        sums = torch.cat([sums, _cross(real, tokens, largest, options.temperature, shard)])
    return Measured(largest, target - largest, floor, sums, *_top(real, largest, options, shard))


def derive(
    measured: Measured, tokens: Tokens, shard: Shard, options: StatisticsOptions
) -> tuple[tuple[Tensor | None, ...], State]:
    """(the fields of TokenStatistics in their order, what the backward needs). One collective."""
    totals = all_sum(measured.sums, shard.group)
    scale = vocab_passes.inverse(options.temperature, totals)
    values, state = _fields(scale, measured, totals, tokens)
    most_probable = _kept_top(measured, tokens.targets, state.s.log(), options) if options.top else (None, None, None)
    return values + most_probable, state


@vocab_passes.fused_on_gpu
def _fields(
    scale: Tensor, measured: Measured, totals: Tensor, tokens: Tokens
) -> tuple[tuple[Tensor | None, ...], State]:
    kept, dropped, h, squares, larger = totals[:5]
    s = kept + dropped
    log_s = s.log()
    log_prob, entropy = measured.target_gap * scale - log_s, log_s - h / s
    # ln(kept / s) as log1p of a ratio: a dropped mass below 6e-8 would round to none in fp32
    log_kept_mass = torch.where(kept > 0, -torch.log1p(dropped / kept), 0.0)
    is_kept = measured.target_gap >= measured.floor
    proxy_log_prob = torch.where(is_kept, log_prob - log_kept_mass, -torch.inf)
    old_kl = torch.where(tokens.old_q.sum(1) > 0, log_s - totals[5], 0.0) if len(totals) > 5 else None
    values = (log_prob, entropy, -log_s, squares / s.square(), log_kept_mass, proxy_log_prob, larger + 1, old_kl)
    return values, State(measured.largest, measured.floor, s, kept, entropy)


def overwrite_with_gradient(
    real: Tensor,
    tokens: Tokens,
    state: State,
    upstream: tuple[Tensor | None, ...],
    shard: Shard,
    options: StatisticsOptions,
) -> None:
    """Put the gradient in the place of the logits ``real`` [T, n]; ``upstream`` [T] is that of the fields in order.

        dz = g_logp ([v = target] - p) - g_H p (ln p + H) + g_lnZ (q - p) + g_KL (p - q_old),  over the temperature

    With p = e / s and q = e / kept that is e (a + b t + c [kept]), and something more at the target and where q_old is.
    """
    if not real.numel():
        return
    scale = vocab_passes.inverse(options.temperature, state.s)
    factors, columns, entries = _gradient(scale, real, tokens, state, upstream, shard.start)
    passes_for(real).overwrite_with_gradient(
        real, state.largest, state.floor, factors, options.temperature, columns, entries
    )


@vocab_passes.fused_on_gpu
def _gradient(
    scale: Tensor, real: Tensor, tokens: Tokens, state: State, upstream: tuple[Tensor | None, ...], start: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """((a, b, c) [T], columns and the gradients there [T, 1 + K]); ``start`` is the id of the first column."""
    factors, more = _factors(scale, tokens, state, upstream)
    return factors, *_entries(scale, real, tokens, state, factors, more, start)


def _factors(
    scale: Tensor, tokens: Tokens, state: State, upstream: tuple[Tensor | None, ...]
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """((a, b, c), what is added for the target and each of the old policy's tokens [T, 1 + K])."""
    _, _, s, kept, entropy = state
    g_log_prob, g_entropy, g_kept_mass, g_kl = (_or_zero(upstream[field], s) for field in (0, 1, 4, 7))
    # where a fixed threshold keeps nothing, ln Z is the constant 0; else the most probable is kept, and kept >= 1
    g_kept_mass = torch.where(kept > 0, g_kept_mass, 0.0)
    g_old_p = torch.where(tokens.old_q.sum(1) > 0, g_kl, 0.0)
    a = (g_old_p - g_log_prob - g_entropy * (entropy - s.log()) - g_kept_mass) / s * scale
    b = -g_entropy / s * scale
    c = g_kept_mass / kept.clamp(min=1.0) * scale

    is_target = tokens.ids() == tokens.targets[:, None]
    old_q = torch.cat([(tokens.old_q * is_target[:, 1:]).sum(1, keepdim=True), tokens.old_q], dim=1)
    return (a, b, c), (g_log_prob[:, None] * is_target - g_kl[:, None] * old_q) * scale


def _entries(
    scale: Tensor,
    real: Tensor,
    tokens: Tokens,
    state: State,
    factors: tuple[Tensor, Tensor, Tensor],
    more: Tensor,
    start: int,
) -> tuple[Tensor, Tensor]:
    """(columns, gradients there) [T, 1 + K] where ``more`` comes in; ``start`` is the id of the first column.

    They are computed whole and not added to: a sum in bf16 would round twice. An id of another rank stands for one of
    its row that is here, and where none is, for a column that gets nothing more: to leave it out is to wait for a GPU.
    """
    owned, column = vocab_passes.own(tokens.ids(), start, real.shape[1])
    here = owned.int().argmax(1, keepdim=True)
    column = torch.where(owned, column, column.gather(1, here))
    more = torch.where(owned, more, torch.where(owned.gather(1, here), more.gather(1, here), 0.0))
    a, b, c = (factor[:, None] for factor in factors)
    gap = real.gather(1, column).to(more.dtype) - state.largest[:, None]
    t = gap * scale
    entry = t.exp() * (a + b * t + torch.where(gap >= state.floor[:, None], c, 0.0)) + more
    return column, torch.where(t > -torch.inf, entry, 0.0).to(real.dtype)


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _cross(real: Tensor, tokens: Tokens, largest: Tensor, temperature: float, shard: Shard) -> Tensor:
    """[1, T] sum of q_old (t - ln q_old) over those of the old policy's tokens that are here."""
    t = (vocab_passes.logits_at(real, tokens.old_ids, shard.start) - largest[:, None]) / temperature
    here = vocab_passes.own(tokens.old_ids, shard.start, shard.real)[0] & (tokens.old_q > 0)
    return torch.where(here, tokens.old_q * (t - tokens.old_q.log()), 0.0).sum(1)[None]


def _top(real: Tensor, largest: Tensor, options: StatisticsOptions, shard: Shard) -> tuple[Tensor, Tensor]:
    """(ids, logits less the largest) of one token more than ``top``, over all ranks, largest first, each [top + 1, T].

    One collective. Every one of them is among as many largest of its own rank. Where there are fewer, -1 at -inf.
    Without ``top`` none, [0, T].
    """
    if options.top == 0:
        none = largest.new_empty(0, len(largest))
        return none, none
    count, local = options.top + 1, min(options.top + 1, real.shape[1])
    # rows at a time: a GPU copies those behind which padding follows
    block = max(1, platform.logits_block_elements() // max(1, real.shape[1]))
    parts = [real[start : start + block].topk(local, dim=1) for start in range(0, max(1, len(real)), block)]
    logits, columns = (torch.cat(each) for each in zip(*parts, strict=True))
    logits = F.pad(logits.to(largest.dtype), (0, count - local), value=-torch.inf)
    ids = F.pad(columns + shard.start, (0, count - local), value=-1)
    if shard.group is not None:
        # ids travel as floats beside the logits: fp32 holds each whole number up to 16 million
        sent = torch.stack([logits, ids.to(logits.dtype)])
        received = all_gather_flat(sent.flatten(), shard.group)
        received = received.view(group_size(shard.group), *sent.shape).movedim(0, 2).flatten(2)
        logits, places = received[0].topk(count, dim=1)
        ids = received[1].gather(1, places).long()
    return ids.t(), (logits - largest[:, None]).t()


def _kept_top(
    measured: Measured, targets: Tensor, log_s: Tensor, options: StatisticsOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [T, top], their ln p [T, top], whether the threshold keeps more than these [T]); -1 at -inf: filtered.

    A kept target that is not among so many takes the last place.
    """
    gaps, ids = measured.top_gaps, measured.top_ids
    ids, cut = ids[:-1], (gaps[-1] >= measured.floor) & (gaps[-1] > -torch.inf)
    outside = (measured.target_gap >= measured.floor) & (measured.target_gap > -torch.inf) & (ids != targets).all(0)
    gaps = torch.cat([gaps[:-2], torch.where(outside, measured.target_gap, gaps[-2])[None]])
    ids = torch.cat([ids[:-1], torch.where(outside, targets, ids[-1])[None]])
    is_kept = (gaps >= measured.floor) & (gaps > -torch.inf)
    log_probs = torch.where(is_kept, gaps / options.temperature - log_s, -torch.inf)
    return torch.where(is_kept, ids, -1).t().contiguous(), log_probs.t().contiguous(), cut
