"""80/20: train only on the tokens where the policy is undecided, the top 20% by entropy (arXiv 2506.01939).

The loss is the mean over the selected tokens; the paper takes it on top of DAPO. Its batch-level threshold is over the
update and all ranks, by the old policy's entropy at the sampling temperature. The 80/20 of Lp-Reg's released code takes
the threshold in each microbatch, by the current entropy:

    algorithm: {reduction: microbatch_token_mean}        exploration: {high_entropy: {scope: microbatch}}
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_rlvr.config import rule
from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.vocab import TokenStatistics
from megatron_rlvr.exploration.base import Needs, TokenSelection
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Batch, Microbatch, Update


@dataclass
class Config:
    share: float = 0.2  # of the loss tokens; at least one is kept
    scope: Literal["update", "microbatch"] = "update"  # update: over every rank, by the old policy's entropy

    def __post_init__(self) -> None:
        rule(
            0 < self.share <= 1,
            f"exploration.high_entropy.share must be in (0, 1], not {self.share}: it is the share that trains",
        )


class HighEntropy(TokenSelection):
    config: Config

    def needs(self) -> Needs:
        return Needs(old_statistics=self.config.scope == "update")

    def select(self, tokens: Microbatch, groups: ParallelGroups) -> Tensor:
        count = int(reduce.all_sum(tokens.loss_mask.sum(), groups.dp))
        k = min(count, max(1, int(self.config.share * count)))
        return tokens.entropy >= reduce.kth_largest(tokens.entropy, tokens.loss_mask, k, groups.dp)

    def prepare_update(self, batch: Batch, update: Update, groups: ParallelGroups) -> None:
        if self.config.scope == "update":
            super().prepare_update(batch, update, groups)

    def policy_loss(self, losses: Tensor, micro: Microbatch, current: TokenStatistics, meter: Meter) -> Tensor:
        if self.config.scope == "update":
            return super().policy_loss(losses, micro, current, meter)
        now = copy.copy(micro)
        now.entropy = current.entropy.detach()
        return self.weigh(losses, micro, self.weights(now, ParallelGroups.single()), meter)
