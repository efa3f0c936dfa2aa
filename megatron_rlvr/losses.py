"""Policy losses and the weights that turn them into one number: pure functions of tensors.

Letters: r = p(o) / p_old(o) is the ratio at a sampled token, A its advantage. Every loss is to be minimised.

    losses = LOSSES["ppo"](log_prob, old_log_prob, advantages, clip_low=0.2, clip_high=0.28)
    loss = (reduction_weights(micro, update, "token_mean") * losses).sum()
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Microbatch, Update

MAX_LOG_RATIO = 20.0  # nats; exp of more than this only overflows


def log_ratio(log_prob: Tensor, other: Tensor) -> Tensor:
    """ln p - ln p_other within +-20 nats; beyond, the gradient is 0."""
    return (log_prob - other).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """r = p / p_old, between e^-20 and e^20."""
    return log_ratio(log_prob, old_log_prob).exp()


def clipped_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> Tensor:
    """PPO's pessimistic loss max(-A r, -A clip(r, 1 - low, 1 + high)), all [t].

    Where A < 0 it grows with r without a bound; ``dual_clip`` c > 1 stops it at -A c (0: off).
    PPO (arXiv 1707.06347) Eq 7; separate clips DAPO (arXiv 2503.14476); dual clip arXiv 1912.09729.
    """
    unclipped = -advantages * ratio(log_prob, old_log_prob)
    clipped = plain_clip(log_prob, old_log_prob, advantages, clip_low, clip_high)
    losses = torch.maximum(unclipped, clipped)
    if not dual_clip:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)


def plain_clip(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> Tensor:
    """-A clip(r, 1 - low, 1 + high), all [t]: no gradient outside the range, whatever the sign of A.

    Lp-Reg (arXiv 2510.03222v2) Eq 6 with low = 1, high = 9, that is clip(r, 0, 10).
    Raises ValueError: a ``dual_clip``, which would never act because ``clip_high`` already bounds r where A < 0.
    """
    if dual_clip:
        raise ValueError("plain_clip bounds the ratio where A < 0: set algorithm.dual_clip=0 or algorithm.loss=ppo")
    return -advantages * ratio(log_prob, old_log_prob).clamp(1 - clip_low, 1 + clip_high)


LOSSES: dict[str, Callable[..., Tensor]] = {"ppo": clipped_surrogate, "plain_clip": plain_clip}


def k1(log_prob: Tensor, other: Tensor) -> Tensor:
    """Estimate of KL(p || other) at tokens drawn from p: ln p - ln other. Unbiased, high variance, may be negative."""
    return log_ratio(log_prob, other)


def k2(log_prob: Tensor, other: Tensor) -> Tensor:
    """Estimate of KL(p || other) at tokens drawn from p: half the squared log-ratio. Its gradient is the KL's."""
    return log_ratio(log_prob, other).square() / 2


def k3(log_prob: Tensor, other: Tensor) -> Tensor:
    """Estimate of KL(p || other) at tokens drawn from p: e^x - x - 1 with x = ln other - ln p within +-20.

    Unbiased and never negative; its gradient, averaged over p, is that of KL(other || p).
    """
    x = log_ratio(other, log_prob)
    return x.exp() - x - 1


def token_mean(micro: Microbatch, update: Update) -> Tensor:
    """Every loss token of the update counts the same."""
    return micro.loss_mask.float() / update.num_tokens


def sequence_mean(micro: Microbatch, update: Update) -> Tensor:
    """Every response counts the same, so long answers do not outweigh short ones; one without tokens adds nothing."""
    lengths = micro.per_token(micro.response_lengths)
    return micro.loss_mask.float() / (lengths.clamp(min=1) * update.num_responses)


def microbatch_token_mean(micro: Microbatch, update: Update) -> Tensor:
    """Token mean inside the microbatch, microbatches weighed by their number of responses.

    What the released Lp-Reg code computes; the result depends on how responses are packed.
    """
    tokens = micro.loss_mask.sum().clamp(min=1)
    return micro.loss_mask.float() / tokens * (micro.num_responses / update.num_responses)


REDUCTIONS: dict[str, Callable[[Microbatch, Update], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "microbatch_token_mean": microbatch_token_mean,
}


def reduction_weights(micro: Microbatch, update: Update, reduction: str) -> Tensor:
    """[t] weights; the sum of weights * losses over every microbatch and rank of the update is the global loss."""
    return REDUCTIONS[reduction](micro, update)


def record(micro: Microbatch, log_prob: Tensor, losses: Tensor, meter: Meter) -> None:
    """How far the policy has moved from the one that sampled; ``losses`` are those of the surrogate.

    policy/clip_share counts the loss tokens whose loss is not -A r, policy/kl estimates KL(old || current) by k3.
    """
    log_prob, losses, mask = log_prob.detach(), losses.detach(), micro.loss_mask
    r = ratio(log_prob, micro.old_log_probs)
    clipped = losses != -micro.advantages * r
    count = mask.sum()
    meter.add("policy/clip_share", (clipped & mask).sum(), count)
    meter.add("policy/kl", torch.where(mask, k3(micro.old_log_probs, log_prob), 0.0).sum(), count)
    meter.maximum("policy/ratio_max", torch.where(mask, r, 0.0).max())
