"""Token statistics over logits whose vocabulary columns are sharded over the tensor-parallel ranks.

One forward gives, per token: log-prob of the target and its rank, entropy, largest log-prob, sum of squared
probabilities, kept mass and proxy log-prob of Lp-Reg (arXiv 2510.03222v2, Eq 5). Rank r holds columns
[r * V/tp, (r + 1) * V/tp). Two collectives with a min-p threshold or none, three with a fixed one, 28 bytes per token
in all, and none in the backward: every rank turns the (equal) upstream gradients into the gradient of its own columns.

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
from megatron_rlvr.distributed import vocab_passes
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

    Gradients flow through ``log_prob``, ``entropy`` and ``log_kept_mass``; the others are detached.
    Uniform over 4 tokens, no threshold: log_prob = -1.386, entropy = 1.386, max_log_prob = -1.386, sum_squares = 0.25,
    log_kept_mass = 0, proxy_log_prob = -1.386, rank = 1.
    """

    log_prob: Tensor  # of the target
    entropy: Tensor  # nats
    max_log_prob: Tensor
    sum_squares: Tensor  # sum of p^2 over the vocabulary: the chance that two samples agree
    log_kept_mass: Tensor  # ln Z <= 0; 0 without a threshold and where a fixed one keeps nothing
    proxy_log_prob: Tensor  # ln q of the target; -inf where the threshold filters it
    rank: Tensor  # of the target: 1 and the number of tokens with a larger logit


def token_statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    options: StatisticsOptions = StatisticsOptions(),
    overwrite: bool = False,
) -> TokenStatistics:
    """Statistics of this rank's ``logits`` [T, V/tp] (any float dtype, maths in fp32 or fp64) at ``targets`` [T] int64.

    ``vocab_size`` is the number of real columns over all ranks; those behind it are padding and take no part. A target
    that is padding, outside every shard, or at a logit of -inf has log_prob -inf. The gradient has the dtype of the
    logits; ``overwrite`` lets the backward write it over them, for logits that nothing else reads: then no matrix
    beside them ever exists. Collectives: forward 2, or 3 with ``options.tau``; backward 0 (the upstream gradient must
    be equal on every rank of ``group``). Raises ValueError when the shapes do not fit.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        shapes = f"{list(logits.shape)} and {list(targets.shape)}"
        raise ValueError(f"token_statistics takes logits [T, V/tp] and targets [T], not {shapes}")
    columns = logits.shape[1]
    start = group_rank(group) * columns
    total = group_size(group) * columns
    if vocab_size is not None and vocab_size > total:
        raise ValueError(f"vocab_size={vocab_size} is more than the {total} columns of all ranks together")
    shard = _Shard(start, min(columns, max(0, (total if vocab_size is None else vocab_size) - start)), group)
    return TokenStatistics(*_TokenStatistics.apply(logits, targets, shard, options, overwrite))


@dataclass(frozen=True)
class _Shard:
    start: int  # vocabulary id of the first local column
    real: int  # local columns that are not padding
    group: ProcessGroup | None


class _TokenStatistics(torch.autograd.Function):
    """With t = (z - max z) / temperature and e = exp t: kept and dropped sum e over columns, s both; h sums e t."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, shard: _Shard, options: StatisticsOptions, overwrite: bool
    ) -> tuple[Tensor, ...]:
        real, group = logits.detach()[:, : shard.real], shard.group
        top, target = all_max(torch.stack([vocab_passes.maximum(real), _target_logit(real, targets, shard)]), group)
        scale = vocab_passes.scales(options.temperature, options.threshold_temperature, like=top)
        if options.tau is not None:
            s_threshold = all_sum(vocab_passes.threshold_sum(real, top, scale), group)[0]
            floor = math.log(options.tau) + s_threshold.log()
        else:
            # no threshold at all is a floor that nothing falls below
            floor = torch.full_like(top, math.log(options.min_p) if options.min_p is not None else -torch.inf)
        kept, dropped, h, squares, larger = all_sum(vocab_passes.sums(real, top, floor, target, scale), group)

        s, target_gap = kept + dropped, target - top
        log_s = s.log()
        log_prob, entropy = target_gap / options.temperature - log_s, log_s - h / s
        # ln(kept / s) as log1p of a ratio: a dropped mass below 6e-8 would round to none in fp32
        log_kept_mass = torch.where(kept > 0, -torch.log1p(dropped / kept), 0.0)
        is_kept = vocab_passes.keeps(target_gap, floor, scale)
        proxy_log_prob = torch.where(is_kept, log_prob - log_kept_mass, -torch.inf)

        ctx.save_for_backward(logits, targets, top, target_gap, s, entropy, kept, floor, scale)
        ctx.shard, ctx.options, ctx.overwrite = shard, options, overwrite
        max_log_prob, sum_squares, rank = -log_s, squares / s.square(), larger + 1
        ctx.mark_non_differentiable(max_log_prob, sum_squares, proxy_log_prob, rank)
        ctx.set_materialize_grads(False)
        return log_prob, entropy, max_log_prob, sum_squares, log_kept_mass, proxy_log_prob, rank

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """dz = g_logp (1[v = target] - p) - g_H p (ln p + H) + g_lnZ (q - p), over the temperature.

        With p = e / s and q = e / kept that is e (a + b t + c [kept]), and g_logp more at the target.
        """
        logits, targets, top, target_gap, s, entropy, kept, floor, scale = ctx.saved_tensors
        options, shard = ctx.options, ctx.shard
        g_log_prob, g_entropy, g_kept_mass = (_or_zero(upstream[field], s) for field in (0, 1, 4))
        # where a fixed threshold keeps nothing, ln Z is the constant 0; else the argmax is kept, and kept >= 1
        g_kept_mass = torch.where(kept > 0, g_kept_mass, 0.0)
        a = -(g_log_prob + g_entropy * (entropy - s.log()) + g_kept_mass) / s / options.temperature
        b = -g_entropy / s / options.temperature
        c = g_kept_mass / kept.clamp(min=1.0) / options.temperature

        gradient = logits.detach() if ctx.overwrite else logits.detach().clone()
        real = gradient[:, : shard.real]
        gradient[:, shard.real :] = 0.0
        vocab_passes.overwrite_with_gradient(real, top, floor, (a, b, c), scale)

        # The target's own entry whole, not added to: a sum in bf16 would round twice.
        t = target_gap * scale[0]
        is_kept = vocab_passes.keeps(target_gap, floor, scale)
        at_target = t.exp() * (a + b * t + torch.where(is_kept, c, 0.0)) + g_log_prob / options.temperature
        owned, column = _owned_column(targets, shard)
        rows = (owned & (t > -torch.inf)).nonzero().squeeze(1)
        real[rows, column[rows]] = at_target[rows].to(gradient.dtype)
        return gradient, None, None, None, None


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _owned_column(targets: Tensor, shard: _Shard) -> tuple[Tensor, Tensor]:
    """Whether the target is among this rank's real columns, and which one (any, where it is not)."""
    column = targets - shard.start
    return (column >= 0) & (column < shard.real), column.clamp(0, max(0, shard.real - 1))


def _target_logit(real: Tensor, targets: Tensor, shard: _Shard) -> Tensor:
    """[T]: the target's logit on the rank that owns it, -inf elsewhere: the maximum over ranks is the logit itself."""
    owned, column = _owned_column(targets, shard)
    if shard.real == 0:
        return vocab_passes.maximum(real)
    logit = real.gather(1, column[:, None]).squeeze(1)
    return torch.where(owned, logit, -torch.inf).to(torch.promote_types(real.dtype, torch.float32))
