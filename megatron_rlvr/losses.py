"""Policy losses and the weights that turn them into one number: pure functions of tensors.

Letters: r = p(o) / p_old(o) is the ratio at a sampled token, A its advantage, sg[] stops the gradient. Every loss is to
be minimised.

    losses, clipped = LOSSES["ppo"](log_prob, micro, Clip(low=0.2, high=0.28))
    loss = (reduction_weights(micro, update, "token_mean") * losses).sum()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlvr.config import KlConfig
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Microbatch, Update

MAX_LOG_RATIO = 20.0  # nats; exp of more than this only overflows
MAX_LOG_SEQUENCE_RATIO = 10.0  # nats, of GSPO's ratio
MAX_WEIGHT = 20.0  # of a token in DPPO
SMALLEST_PROB = 1e-8  # what is left for the other tokens where a token's probability rounds to 1


def log_ratio(log_prob: Tensor, other: Tensor) -> Tensor:
    """ln p - ln p_other within +-20 nats; beyond, the gradient is 0."""
    return (log_prob - other).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """r = p / p_old, between e^-20 and e^20."""
    return log_ratio(log_prob, old_log_prob).exp()


@dataclass(frozen=True)
class Clip:
    """The range [1 - low, 1 + high] of the ratio (DPPO: how far p may move down and up), and PPO's dual clip c."""

    low: float
    high: float
    dual: float = 0.0  # 0: off


# Each: log_prob [t] with its gradient, the microbatch, the clip -> losses [t], and which tokens the clip acts on [t].
Loss = Callable[[Tensor, Microbatch, Clip], tuple[Tensor, Tensor]]


def clipped_surrogate(log_prob: Tensor, micro: Microbatch, clip: Clip) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic loss max(-A r, -A clip(r, 1 - low, 1 + high)).

    Where A < 0 it grows with r without a bound; a dual clip c > 1 stops it at -A c.
    PPO (arXiv 1707.06347) Eq 7; separate clips DAPO (arXiv 2503.14476); dual clip arXiv 1912.09729.
    """
    return _pessimistic(ratio(log_prob, micro.old_log_probs), micro.advantages, clip)


def _pessimistic(r: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    unclipped = -advantages * r
    losses = torch.maximum(unclipped, -advantages * r.clamp(1 - clip.low, 1 + clip.high))
    if clip.dual:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * clip.dual), losses)
    return losses, losses != unclipped


def plain_clip(log_prob: Tensor, micro: Microbatch, clip: Clip) -> tuple[Tensor, Tensor]:
    """-A clip(r, 1 - low, 1 + high): no gradient outside the range, whatever the sign of A.

    Lp-Reg (arXiv 2510.03222v2) Eq 6 with low = 1, high = 9, that is clip(r, 0, 10).
    """
    r = ratio(log_prob, micro.old_log_probs)
    losses = -micro.advantages * r.clamp(1 - clip.low, 1 + clip.high)
    return losses, losses != -micro.advantages * r


def unclipped(log_prob: Tensor, micro: Microbatch, clip: Clip) -> tuple[Tensor, Tensor]:
    """-A r: the policy gradient with importance weights alone, what KL-Cov builds on; on-policy it is REINFORCE's."""
    return -micro.advantages * ratio(log_prob, micro.old_log_probs), torch.zeros_like(micro.loss_mask)


def sequence_ratio(log_prob: Tensor, micro: Microbatch, clip: Clip) -> tuple[Tensor, Tensor]:
    """GSPO: PPO's loss on one ratio per response, the geometric mean s of its r, here sg[s] p / sg[p] at each token.

    With one advantage per response and reduction sequence_mean, value and gradient are those of the loss of s itself:
    each token carries 1/length of the gradient of ln s. ln s is cut off at 10. arXiv 2507.18071.
    """
    per_response = micro.per_response_sum(log_ratio(log_prob, micro.old_log_probs).detach())
    log_s = per_response / micro.response_lengths.clamp(min=1)
    s = (micro.per_token(log_s) + log_prob - log_prob.detach()).clamp(max=MAX_LOG_SEQUENCE_RATIO).exp()
    return _pessimistic(s, micro.advantages, clip)


def clipped_weight(log_prob: Tensor, micro: Microbatch, clip: Clip) -> tuple[Tensor, Tensor]:
    """CISPO: -sg[clip(r, 1 - low, 1 + high)] A ln p. A clipped token keeps its gradient, with a bounded weight.

    low = 1 is no lower bound, the canonical choice. MiniMax-M1 (arXiv 2506.13585).
    """
    r = ratio(log_prob, micro.old_log_probs).detach()
    weight = r.clamp(1 - clip.low, 1 + clip.high)
    return -weight * micro.advantages * log_prob, weight != r


def trust_region_tv(log_prob: Tensor, micro: Microbatch, clip: Clip) -> tuple[Tensor, Tensor]:
    """DPPO, total variation: no gradient where p has moved more than ``high`` up (A > 0) or ``low`` down (else).

    The distance is that of "this token or any other", |p - p_old|: a rare token may move by a large ratio, a common one
    may not take much mass away. arXiv 2602.04879.
    """
    moved = (log_prob.exp() - micro.old_log_probs.exp()).detach()
    outside = torch.where(micro.advantages > 0, moved > clip.high, moved < -clip.low)
    return _truncated_weight(log_prob, micro, outside), outside


def trust_region_kl(log_prob: Tensor, micro: Microbatch, clip: Clip) -> tuple[Tensor, Tensor]:
    """DPPO, KL: as trust_region_tv, by KL(p_old || p) of "this token or any other" in nats."""
    p, old = log_prob.detach().exp(), micro.old_log_probs.exp()
    others, old_others = (1 - p).clamp(min=SMALLEST_PROB), (1 - old).clamp(min=SMALLEST_PROB)
    divergence = old * (micro.old_log_probs - log_prob.detach()) + old_others * (old_others / others).log()
    up = micro.advantages > 0
    outside = torch.where(up, (p > old) & (divergence > clip.high), (p < old) & (divergence > clip.low))
    return _truncated_weight(log_prob, micro, outside), outside


def _truncated_weight(log_prob: Tensor, micro: Microbatch, outside: Tensor) -> Tensor:
    """-sg[min(r, 20)] A ln p, 0 where ``outside``."""
    weight = ratio(log_prob, micro.old_log_probs).detach().clamp(max=MAX_WEIGHT)
    return torch.where(outside, 0.0, -weight * micro.advantages * log_prob)


LOSSES: dict[str, Loss] = {
    "ppo": clipped_surrogate,
    "plain_clip": plain_clip,
    "unclipped": unclipped,
    "gspo": sequence_ratio,
    "cispo": clipped_weight,
    "dppo_tv": trust_region_tv,
    "dppo_kl": trust_region_kl,
}


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((V - R)^2, (V_clipped - R)^2) / 2 with V kept within ``clip`` of the value before the update (0: no limit).

    values and old_values [t, H], returns [t], the same for every head -> [t, H]. A head that has moved further than
    ``clip`` away from its old value, towards R, has no gradient. As in OpenAI's baselines of PPO.
    """
    targets = returns[:, None]
    squares = (values - targets).square()
    if clip:
        kept_near = old_values + (values - old_values).clamp(-clip, clip)
        squares = torch.maximum(squares, (kept_near - targets).square())
    return squares / 2


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


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_penalty(micro: Microbatch, log_prob: Tensor, settings: KlConfig, meter: Meter) -> Tensor:
    """[t] coefficient * KL(policy || reference), estimated from the sampled token; 0 outside the loss mask.

    policy/ref_kl is the mean in nats, of k3 as it is cut off. Gradients flow through ``log_prob``.
    """
    distance = KL_ESTIMATORS[settings.estimator](log_prob, micro.ref_log_probs)
    if settings.estimator == "k3" and settings.k3_clamp:
        distance = distance.clamp(max=settings.k3_clamp)
    distance = torch.where(micro.loss_mask, distance, 0.0)
    meter.add("policy/ref_kl", distance.sum(), micro.loss_mask.sum())
    return settings.coefficient * distance


def token_mean(micro: Microbatch, update: Update, length: int) -> Tensor:
    """Every loss token of the update counts the same."""
    return micro.loss_mask.float() / max(1, update.num_tokens)


def sequence_mean(micro: Microbatch, update: Update, length: int) -> Tensor:
    """Every response counts the same, so long answers do not outweigh short ones; one without tokens adds nothing."""
    lengths = micro.per_token(micro.response_lengths)
    return micro.loss_mask.float() / (lengths.clamp(min=1) * max(1, update.num_responses))


def sequence_sum(micro: Microbatch, update: Update, length: int) -> Tensor:
    """Every token counts the same in every update: a response's sum over a constant length.

    A mean over the tokens that happen to be there would weigh a token less among long answers. Dr.GRPO
    (arXiv 2503.20783).
    """
    return micro.loss_mask.float() / (length * max(1, update.num_responses))


def microbatch_token_mean(micro: Microbatch, update: Update, length: int) -> Tensor:
    """Token mean inside the microbatch, microbatches weighed by their number of scored responses.

    What the released Lp-Reg code computes; the result depends on how responses are packed.
    """
    tokens, responses = micro.loss_mask.sum().clamp(min=1), (micro.response_lengths > 0).sum()
    return micro.loss_mask.float() / tokens * (responses / max(1, update.num_responses))


REDUCTIONS: dict[str, Callable[[Microbatch, Update, int], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "microbatch_token_mean": microbatch_token_mean,
}


def reduction_weights(micro: Microbatch, update: Update, reduction: str, length: int = 1) -> Tensor:
    """[t] weights; the sum of weights * losses over every microbatch and rank of the update is the global loss.

    ``length``: the constant that sequence_sum divides by, the longest response there can be.
    """
    return REDUCTIONS[reduction](micro, update, length)


def record(micro: Microbatch, log_prob: Tensor, clipped: Tensor, meter: Meter) -> None:
    """How far the policy has moved from the one that sampled.

    policy/clip_share counts the loss tokens that the loss's clip acts on, policy/kl estimates KL(old || current) by k3.
    """
    log_prob, mask = log_prob.detach(), micro.loss_mask
    count = mask.sum()
    meter.add("policy/clip_share", (clipped & mask).sum(), count)
    meter.add("policy/kl", torch.where(mask, k3(micro.old_log_probs, log_prob), 0.0).sum(), count)
    meter.maximum("policy/ratio_max", torch.where(mask, ratio(log_prob, micro.old_log_probs), 0.0).max())
