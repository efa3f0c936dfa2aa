"""A small batch with random logits, and one step of the loss over it: what the tests of the methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlvr import losses
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.vocab import TokenStatistics, token_statistics
from megatron_rlvr.exploration.base import Exploration
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Batch, Microbatch, Update

VOCAB = 13


def make_batch(lengths: list[int], seed: int = 0, microbatches: tuple[tuple[int, int], ...] = ()) -> Batch:
    """Responses of ``lengths`` behind prompts of two tokens; random targets and advantages; one update."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([flag for length in lengths for flag in [False] + [True] * length + [False]])
    index = torch.tensor([place for place, length in enumerate(lengths) for _ in range(length + 2)])
    total, count = mask.numel(), len(lengths)
    return Batch(
        token_ids=torch.zeros(total, dtype=torch.int64),
        target_ids=torch.randint(VOCAB, (total,), generator=generator),
        position_ids=torch.zeros(total, dtype=torch.int64),
        loss_mask=mask,
        response_index=index,
        rollout_log_probs=torch.zeros(total),
        cu_seqlens=torch.tensor([0, *(length + 2 for length in lengths)]).cumsum(0).int(),
        response_ids=torch.arange(count),
        rewards=torch.zeros(count),
        response_lengths=torch.tensor(lengths),
        advantages=torch.randn(count, generator=generator)[index],
        updates=(Update(microbatches or ((0, count),), sum(lengths), count),),
        num_step_responses=count,
    )


def make_logits(batch: Batch, seed: int = 0, scale: float = 1.0) -> Tensor:
    """[T, VOCAB] fp64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(batch.num_tokens, VOCAB, generator=generator, dtype=torch.float64)


def statistics(logits: Tensor, micro: Microbatch, method: Exploration, temperature: float = 1.0) -> TokenStatistics:
    old_top = (micro.old_top_ids, micro.old_top_log_probs) if micro.has("old_top_ids") else None
    options = method.needs().statistics(temperature)
    return token_statistics(logits, micro.target_ids, old_top=old_top, **vars(options))


def fill_old(batch: Batch, logits: Tensor, method: Exploration, temperature: float = 1.0) -> Batch:
    """What the old policy's pass fills."""
    with torch.no_grad():
        old = statistics(logits, batch, method, temperature)
    batch.old_log_probs = old.log_prob
    if old.top_ids is not None:
        batch.old_top_ids, batch.old_top_log_probs = old.top_ids, old.top_log_probs
    batch.extras = method.annotate(batch, old)
    return batch


def fill_rollout(batch: Batch, logits: Tensor, method: Exploration) -> Batch:
    """What a step with one update per rollout starts from: the old policy has had no pass, the rollout carries it."""
    with torch.no_grad():
        batch.rollout_log_probs = statistics(logits, batch, method).log_prob
    return batch


def update_loss(
    batch: Batch,
    logits: Tensor,
    method: Exploration,
    loss: str,
    clip: tuple[float, float],
    reduction: str = "token_mean",
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The loss of the batch's only update over its microbatches, its gradient in the logits, and the metrics.

    As the step does, it takes the current policy for the old one where that has had no pass.
    """
    (update,) = batch.updates
    meter, leaf = Meter(), logits.clone().requires_grad_()
    method.prepare_update(batch, update, ParallelGroups.single())
    total = torch.zeros((), dtype=torch.float64)
    for start, stop in update.microbatches:
        micro = batch.microbatch(start, stop)
        rows = slice(int(batch.cu_seqlens[start]), int(batch.cu_seqlens[stop]))
        current = statistics(leaf[rows], micro, method)
        if not batch.has("old_log_probs"):
            micro.old_log_probs = current.log_prob.detach()
        surrogate, _ = losses.LOSSES[loss](current.log_prob, micro, losses.Clip(*clip))
        shaped = method.policy_loss(surrogate, micro, current, meter)
        total = total + (losses.reduction_weights(micro, update, reduction) * shaped).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    return total.detach(), gradient, meter.means()
