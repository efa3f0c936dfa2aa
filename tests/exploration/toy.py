"""A small batch with random logits, and one step of the loss over it: what the tests of the methods share."""

from __future__ import annotations

import copy

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


def deal(batch: Batch, microbatches: list[list[int]]) -> tuple[Batch, Tensor]:
    """The share of a rank that holds these responses in these microbatches, and which rows of the batch those are."""
    order = [response for members in microbatches for response in members]
    bounds = batch.cu_seqlens.tolist()
    lengths = torch.tensor([bounds[response + 1] - bounds[response] for response in order])
    rows = torch.cat([torch.arange(bounds[response], bounds[response + 1]) for response in order])
    ends = torch.tensor([len(members) for members in microbatches]).cumsum(0).tolist()
    (update,) = batch.updates
    fixed = ("token_ids", "target_ids", "position_ids", "loss_mask", "rollout_log_probs")
    later = ("old_log_probs", "old_top_ids", "old_top_log_probs", "entropy", "ref_log_probs", "advantages")
    values = {name: getattr(batch, name)[rows] for name in (*fixed, *later) if batch.has(name)}
    values |= {name: getattr(batch, name)[order] for name in ("response_ids", "rewards", "response_lengths")}
    values["response_index"] = torch.arange(len(order)).repeat_interleave(lengths)
    values["cu_seqlens"] = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    share = copy.copy(batch)
    for name, tensor in values.items():
        setattr(share, name, tensor)
    share.extras = {name: tensor[rows] for name, tensor in batch.extras.items()}
    bounds = tuple(zip([0, *ends[:-1]], ends, strict=True))
    share.updates = (Update(bounds, update.num_tokens, update.num_responses),)
    return share, rows


def fill_old(
    batch: Batch, logits: Tensor, method: Exploration, temperature: float = 1.0, reference: Tensor | None = None
) -> Batch:
    """What the passes of the old policy and of the reference, by its logits, fill."""
    with torch.no_grad():
        old = statistics(logits, batch, method, temperature)
        scored = None if reference is None else statistics(reference, batch, method, temperature)
    batch.old_log_probs, batch.entropy = old.log_prob, old.entropy
    if old.top_ids is not None:
        batch.old_top_ids, batch.old_top_log_probs = old.top_ids, old.top_log_probs
    batch.extras = method.annotate(batch, old, scored)
    return batch


def old_and_current(batch: Batch, method: Exploration, drift: float) -> Tensor:
    """Fill the old policy's fields; the current policy's logits, ``drift`` away from the old ones."""
    logits = make_logits(batch)
    fill_old(batch, logits, method)
    return logits + drift * make_logits(batch, seed=1)


def sampled(log_p: Tensor, batch: Batch) -> Tensor:
    return log_p.gather(1, batch.target_ids[:, None])[:, 0]


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
