"""What the critic is asked for and what it is taught: advantages, returns, and which head learns from which token.

    raw = fill_targets(batch, rewards, config.critic, (config.seed, step), groups, meter, config.algorithm.kl)

The heads of an ensemble learn from data of their own, so that they agree where there is much of it and differ where
there is little: CDE (arXiv 2509.09675v1) Sec 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlvr.advantages import gae
from megatron_rlvr.config import CriticConfig, KlConfig
from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.losses import kl_penalty
from megatron_rlvr.metrics import Meter
from megatron_rlvr.seeds import stable_seed
from megatron_rlvr.types import Batch


def fill_targets(
    batch: Batch,
    rewards: Tensor,
    settings: CriticConfig,
    seed: tuple[int, int],
    groups: ParallelGroups,
    meter: Meter,
    kl: KlConfig | None = None,
) -> Tensor:
    """[S] rewards, each earned with its response's last token -> [T] advantages of GAE, not whitened.

    With ``kl.where: reward`` each token also loses its own KL to the reference. The value of a state is the mean of its
    heads. Fills returns and value_weights, and meters critic/* of the values as
    they were before the update. ``seed`` is (run seed, step). Collective over the data-parallel ranks.
    """
    mask, lengths = batch.loss_mask, batch.response_lengths
    values = batch.values.mean(dim=1)
    of_tokens = torch.zeros_like(values[mask])
    of_tokens[lengths.cumsum(0)[lengths > 0] - 1] = rewards[lengths > 0]
    if kl and kl.coefficient > 0 and kl.where == "reward":
        of_tokens -= kl_penalty(batch, batch.known_log_probs, kl, meter)[mask]
    advantages = torch.zeros_like(values)
    advantages[mask] = gae(of_tokens, values[mask], lengths, settings.gamma, settings.lam)
    batch.returns = torch.where(mask, advantages + values, 0.0)
    batch.value_weights = _value_weights(batch, settings, seed, groups)
    _record(batch, values, groups, meter)
    return advantages


def _value_weights(batch: Batch, settings: CriticConfig, seed: tuple[int, int], groups: ParallelGroups) -> Tensor:
    """[T, H] 1 / n where a head learns from a token, n being all such pairs of the update over every rank; else 0."""
    lengths = reduce.gather_by_index(batch.response_lengths, batch.response_ids, batch.num_step_responses, groups.dp)
    lengths = lengths.cpu()
    chosen = [
        head_choice(part, settings.num_heads, settings.share, settings.share_of, (*seed, number))
        for number, part in enumerate(lengths.chunk(len(batch.updates)))
    ]
    of_step = torch.cat([choice / choice.sum().clamp(min=1) for choice in chosen])
    of_responses = of_step.split(lengths.tolist())
    mine = torch.cat([of_responses[identity] for identity in batch.response_ids.tolist()])
    weights = torch.zeros_like(batch.values)
    weights[batch.loss_mask] = mine.to(weights)
    return weights


def head_choice(lengths: Tensor, heads: int, share: float, share_of: str, seed: tuple[int, ...]) -> Tensor:
    """[n, heads] bool: which heads learn from each of the n = sum(lengths) tokens of an update, response by response.

    Each head draws ``share`` of the responses that have tokens, or of the tokens, without replacement and at least one,
    from a seed of its own: the choice depends on the update and not on where its responses are.
    """
    units = lengths[lengths > 0] if share_of == "responses" else torch.ones(int(lengths.sum()), dtype=torch.int64)
    size = max(1, round(share * units.numel()))
    chosen = torch.zeros(units.numel(), heads, dtype=torch.bool)
    for head in range(heads):
        generator = torch.Generator().manual_seed(stable_seed(*seed, head))
        chosen[torch.randperm(units.numel(), generator=generator)[:size], head] = True
    return chosen.repeat_interleave(units, dim=0)


def _record(batch: Batch, values: Tensor, groups: ParallelGroups, meter: Meter) -> None:
    """Means of values, returns and the heads' spread, and how much of all ranks' returns the values explain."""
    mask, returns = batch.loss_mask, batch.returns
    count = mask.sum()
    meter.add("critic/value_mean", values[mask].sum(), count)
    meter.add("critic/return_mean", returns[mask].sum(), count)
    meter.add("critic/head_std", batch.values.std(dim=1, correction=0)[mask].sum(), count)
    unexplained, total = (reduce.masked_std(item, mask, groups.dp) for item in (returns - values, returns))
    if total > 1e-6 * reduce.masked_mean(returns.abs(), mask, groups.dp):  # equal returns differ by their rounding
        meter.add("critic/explained_variance", 1 - (unexplained / total).square())
