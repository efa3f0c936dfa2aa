"""STAPO: leave out rewarded tokens that are improbable although the policy was certain (arXiv 2602.15620v4).

    left out:   A > 0,   p(o) < tau   and   H below the q-quantile of the update

About one token in ten thousand, each with a large gradient on something that the policy did not mean. The loss is the
mean over the tokens that are left. It acts on the positive side only, where Lp-Reg acts on the negative one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_rlvr.config import rule
from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.exploration.base import TokenSelection
from megatron_rlvr.types import Microbatch


@dataclass
class Config:
    tau: float = 0.002  # probability below which a token is improbable
    quantile: float = 0.75  # of the update's entropies; below it the policy was certain

    def __post_init__(self) -> None:
        name = "exploration.stapo"
        rule(0 < self.tau < 1, f"{name}.tau must be in (0, 1), not {self.tau}: it is a probability")
        rule(0 < self.quantile < 1, f"{name}.quantile must be in (0, 1), not {self.quantile}: it is a share of tokens")


class Stapo(TokenSelection):
    config: Config

    def select(self, tokens: Microbatch, groups: ParallelGroups) -> Tensor:
        count = int(reduce.all_sum(tokens.loss_mask.sum(), groups.dp))
        k = math.ceil(round(self.config.quantile * count, 6))
        certain = tokens.entropy < reduce.kth_smallest(tokens.entropy, tokens.loss_mask, k, groups.dp)
        improbable = tokens.old_log_probs < math.log(self.config.tau)
        return ~((tokens.advantages > 0) & improbable & certain)
