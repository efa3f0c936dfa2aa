"""Token statistics over logits whose vocabulary columns are sharded over the tensor-parallel ranks.

One forward gives, per token: log-prob of the target, entropy, largest log-prob, sum of squared probabilities, kept
mass and proxy log-prob of Lp-Reg (arXiv 2510.03222v2, Eq 5). Rank r holds columns [r * V/tp, (r + 1) * V/tp). Two
collectives with a min-p threshold or none, three with a fixed one, and none in the backward: every rank turns the
(equal) upstream gradients into the gradient of its own columns.

The idea: with gap_v = z_v - max z, "p_v >= min_p * max p" reads gap_v >= ln min_p and needs no normaliser, so the kept
mass is one more sum beside the softmax's own, in the same collective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rlvr.config import rule
from megatron_rlvr.distributed.groups import group_rank, group_size
from megatron_rlvr.distributed.reduce import all_max, all_sum


@dataclass(frozen=True)
class StatisticsOptions:
    """What the statistics are of: p = softmax(logits / temperature), and which tokens the proxy keeps.

    With p at ``threshold_temperature``, ``min_p`` keeps p >= min_p * max p and ``tau`` keeps p >= tau; ties stay.
    """

    temperature: float = 1.0
    min_p: float | None = None
    tau: float | None = None
    threshold_temperature: float = 1.0

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


@dataclass(frozen=True)
class TokenStatistics:
    """Per token, all [T] fp32 (fp64 for fp64 logits), equal on every tensor-parallel rank.

    Gradients flow through ``log_prob``, ``entropy`` and ``log_kept_mass``; the other three are detached.
    Uniform over 4 tokens, no threshold: log_prob = -1.386, entropy = 1.386, max_log_prob = -1.386, sum_squares = 0.25,
    log_kept_mass = 0, proxy_log_prob = -1.386.
    """

    log_prob: Tensor  # of the target
    entropy: Tensor  # nats
    max_log_prob: Tensor
    sum_squares: Tensor  # sum of p^2 over the vocabulary: the chance that two samples agree
    log_kept_mass: Tensor  # ln Z <= 0; 0 without a threshold and where a fixed one keeps nothing
    proxy_log_prob: Tensor  # ln q of the target; -inf where the threshold filters it


def token_statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    options: StatisticsOptions = StatisticsOptions(),
) -> TokenStatistics:
    """Statistics of this rank's ``logits`` [T, V/tp] (any float dtype, maths in fp32 or fp64) at ``targets`` [T] int64.

    ``vocab_size`` is the number of real columns over all ranks; those behind it are padding and take no part. A target
    that is padding, outside every shard, or at a logit of -inf has log_prob -inf. The gradient has the dtype of the
    logits. Collectives: forward 2, or 3 with ``options.tau``; backward 0 (the upstream gradient must be equal on every
    rank of ``group``). Raises ValueError when the shapes do not fit.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        shapes = f"{list(logits.shape)} and {list(targets.shape)}"
        raise ValueError(f"token_statistics takes logits [T, V/tp] and targets [T], not {shapes}")
    columns = logits.shape[1]
    start = group_rank(group) * columns
    total = group_size(group) * columns
    if vocab_size is not None and vocab_size > total:
        raise ValueError(f"vocab_size={vocab_size} is more than the {total} columns of all ranks together")
    shard = _Shard(start, min(columns, max(0, (total if vocab_size is None else vocab_size) - start)), total, group)
    return TokenStatistics(*_TokenStatistics.apply(logits, targets, shard, options))


@dataclass(frozen=True)
class _Shard:
    start: int  # vocabulary id of the first local column
    real: int  # local columns that are not padding
    total: int  # columns over all ranks
    group: ProcessGroup | None


class _TokenStatistics(torch.autograd.Function):
    """With t = gap / temperature and e = exp t: s, kept and dropped sum e over columns; h sums e t."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, shard: _Shard, options: StatisticsOptions
    ) -> tuple[Tensor, ...]:
        scores = _scores(logits, shard)
        maximum = all_max(scores.amax(dim=1), shard.group)
        gaps = scores - maximum[:, None]
        t = gaps / options.temperature
        e = t.exp()

        sums = [e.sum(1), (e * _finite(t)).sum(1), e.square().sum(1), _target_gap(gaps, targets, shard)]
        if options.tau is None:
            # no threshold at all is a floor that nothing falls below
            floor = torch.full_like(maximum, math.log(options.min_p) if options.min_p is not None else -torch.inf)
            sums += _split_mass(e, gaps, floor, options)
            s, h, squares, target_gap, kept, dropped = all_sum(torch.stack(sums), shard.group)
        else:
            sums += [(gaps / options.threshold_temperature).exp().sum(1)]
            s, h, squares, target_gap, s_threshold = all_sum(torch.stack(sums), shard.group)
            floor = math.log(options.tau) + s_threshold.log()
            kept, dropped = all_sum(torch.stack(_split_mass(e, gaps, floor, options)), shard.group)

        log_s = s.log()
        log_prob, entropy = target_gap / options.temperature - log_s, log_s - h / s
        # ln(kept / s) as log1p of a ratio: a dropped mass below 6e-8 would round to none in fp32
        log_kept_mass = torch.where(kept > 0, -torch.log1p(dropped / kept), 0.0)
        proxy_log_prob = torch.where(_keeps(target_gap, floor, options), log_prob - log_kept_mass, -torch.inf)

        ctx.save_for_backward(logits, targets, maximum, s, entropy, kept, floor)
        ctx.shard, ctx.options = shard, options
        max_log_prob, sum_squares = -log_s, squares / s.square()
        ctx.mark_non_differentiable(max_log_prob, sum_squares, proxy_log_prob)
        ctx.set_materialize_grads(False)
        return log_prob, entropy, max_log_prob, sum_squares, log_kept_mass, proxy_log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """dz = g_logp (1[v = target] - p) - g_H p (ln p + H) + g_lnZ (q - p), over the temperature."""
        logits, targets, maximum, s, entropy, kept, floor = ctx.saved_tensors
        g_log_prob, g_entropy, g_kept_mass = upstream[0], upstream[1], upstream[4]
        gaps = _scores(logits, ctx.shard) - maximum[:, None]
        t = gaps / ctx.options.temperature
        p = t.exp() / s[:, None]

        gradient = torch.zeros_like(p)
        if g_log_prob is not None:
            gradient -= g_log_prob[:, None] * p
            owned, column = _owned_column(targets, ctx.shard, p.shape[1])
            gradient.scatter_add_(1, column[:, None], torch.where(owned, g_log_prob, 0.0)[:, None])
        if g_entropy is not None:
            gradient -= g_entropy[:, None] * p * (_finite(t) - s.log()[:, None] + entropy[:, None])
        if g_kept_mass is not None:
            # where a fixed threshold keeps nothing, ln Z is the constant 0; else the argmax is kept, and kept >= 1
            g_kept_mass = torch.where(kept > 0, g_kept_mass, 0.0)
            q = torch.where(_keeps(gaps, floor[:, None], ctx.options), p * (s / kept.clamp(min=1.0))[:, None], 0.0)
            gradient += g_kept_mass[:, None] * (q - p)
        return (gradient / ctx.options.temperature).to(logits.dtype), None, None, None


def _scores(logits: Tensor, shard: _Shard) -> Tensor:
    """The logits in the dtype of the maths, padded columns at -inf."""
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if shard.real == logits.shape[1]:
        return scores
    padding = torch.arange(logits.shape[1], device=logits.device) >= shard.real
    return scores.masked_fill(padding, -torch.inf)


def _finite(t: Tensor) -> Tensor:
    """0 in place of -inf: there p is 0, and 0 * -inf would be NaN where the limit of p ln p is 0."""
    return t.masked_fill(t == -torch.inf, 0.0)


def _keeps(gaps: Tensor, floor: Tensor, options: StatisticsOptions) -> Tensor:
    """Whether the threshold keeps a column: the one place that says so, so that rounding cannot answer it two ways."""
    return gaps / options.threshold_temperature >= floor


def _split_mass(e: Tensor, gaps: Tensor, floor: Tensor, options: StatisticsOptions) -> list[Tensor]:
    """Local sums of e over kept and over dropped columns; the dropped one is summed, for s - k would cancel."""
    keeps = _keeps(gaps, floor[:, None], options)
    return [torch.where(keeps, e, 0.0).sum(1), torch.where(keeps, 0.0, e).sum(1)]


def _owned_column(targets: Tensor, shard: _Shard, columns: int) -> tuple[Tensor, Tensor]:
    """Whether the target is among this rank's columns, and which one (any, where it is not)."""
    column = targets - shard.start
    return (column >= 0) & (column < columns), column.clamp(0, columns - 1)


def _target_gap(gaps: Tensor, targets: Tensor, shard: _Shard) -> Tensor:
    """[T]: the target's gap on the rank that owns it and 0 elsewhere; -inf for a target that nobody owns."""
    owned, column = _owned_column(targets, shard, gaps.shape[1])
    gap = torch.where(owned, gaps.gather(1, column[:, None]).squeeze(1), 0.0)
    return torch.where((targets >= 0) & (targets < shard.total), gap, -torch.inf)
