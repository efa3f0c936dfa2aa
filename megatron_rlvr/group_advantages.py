"""Advantages without a critic: what a response earned, against the others of its group wherever they are."""

from __future__ import annotations

from torch import Tensor

from megatron_rlvr.advantages import ESTIMATORS, sum_before
from megatron_rlvr.config import AlgorithmConfig
from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.losses import kl_penalty
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Batch


def group_advantages(
    batch: Batch, rewards: Tensor, scored: Tensor, algorithm: AlgorithmConfig, groups: ParallelGroups, meter: Meter
) -> Tensor:
    """[S] shaped rewards of this rank, [P, G] which responses of the step are scored -> [T] advantages.

    With ``algorithm.kl.where: reward`` a response loses what its tokens' KL to the reference adds up to; without a
    baseline (``reinforce``) a token loses only that of itself and the later ones, its return-to-go. Collective over the
    data-parallel ranks.
    """
    kl = algorithm.kl
    in_reward = kl.coefficient > 0 and kl.where == "reward"
    if in_reward:
        penalty = kl_penalty(batch, batch.known_log_probs, kl, meter)
        rewards = rewards - batch.per_response_sum(penalty)
    of_step = reduce.gather_by_index(rewards, batch.response_ids, batch.num_step_responses, groups.dp)
    estimated = ESTIMATORS[algorithm.advantage](of_step.view(scored.shape), scored)
    advantages = batch.per_token(estimated.flatten()[batch.response_ids])
    if in_reward and algorithm.advantage == "reinforce":
        advantages = advantages + sum_before(penalty, batch)
    return reduce.whiten(advantages, batch.loss_mask, groups.dp) if algorithm.whiten else advantages
