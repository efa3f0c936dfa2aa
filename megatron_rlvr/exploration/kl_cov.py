"""KL-Cov: hold back the tokens that drive the entropy down, those whose log-prob and advantage vary together most.

    cov_t = (A_t - mean A) (ln p_t - mean ln p)
    L_t   = surrogate_t + coefficient * |ln p_t - ln p_old_t|   on the tokens of highest covariance

arXiv 2505.22617; github PRIME-RL/Entropy-Mechanism-of-RL @8850579 takes 0.002 (7B) or 0.0002 (32B) of the tokens and
coefficient 1, does not clip the surrogate, and selects in each microbatch by the current log-probs:

    algorithm: {loss: unclipped}        exploration: {kl_cov: {scope: microbatch}}

The penalty has no gradient where p = p_old, so nothing happens in the first update after a rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_rlvr.config import Config as RunConfig
from megatron_rlvr.config import rule
from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.vocab import TokenStatistics
from megatron_rlvr.exploration.base import Exploration, Needs
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Batch, Microbatch, Update


@dataclass
class Config:
    share: float = 0.002  # of the loss tokens; at least one is penalised
    coefficient: float = 1.0  # loss per nat of |ln p - ln p_old|
    scope: Literal["update", "microbatch"] = "update"  # update: over every rank, by old log-probs

    def __post_init__(self) -> None:
        name = "exploration.kl_cov"
        rule(0 < self.share <= 1, f"{name}.share must be in (0, 1], not {self.share}: it is a share of the tokens")
        rule(
            self.coefficient >= 0,
            f"{name}.coefficient must be at least 0, not {self.coefficient}: below 0 it would drive p away from p_old",
        )


class KlCov(Exploration):
    order = 30
    excludes = "covariance"
    config: Config

    def __init__(self, name: str, config: Config, run: RunConfig | None = None) -> None:
        super().__init__(name, config, run)
        rule(
            self.run.learns_from_older,
            "exploration.kl_cov does nothing in the first update after a rollout, and there is no second one with "
            f"trainer.updates_per_rollout={self.run.trainer.updates_per_rollout}: set that to 2 or more",
        )

    def needs(self) -> Needs:
        return Needs(old_statistics=self.config.scope == "update")

    def prepare_update(self, batch: Batch, update: Update, groups: ParallelGroups) -> None:
        if self.config.scope == "update":
            whole = batch.of_update(update)
            batch.keep(update, "kl_cov/selected", self._select(whole, whole.old_log_probs, groups))

    def policy_loss(self, losses: Tensor, micro: Microbatch, current: TokenStatistics, meter: Meter) -> Tensor:
        if self.config.scope == "update":
            selected = micro.extras["kl_cov/selected"]
        else:
            selected = self._select(micro, current.log_prob, ParallelGroups.single())
        moved = (current.log_prob - micro.old_log_probs).abs()
        meter.add("kl_cov/share", selected.sum(), micro.loss_mask.sum())
        meter.add("kl_cov/moved", torch.where(selected, moved, 0.0).sum(), selected.sum())
        return losses + torch.where(selected, self.config.coefficient * moved, 0.0)

    def _select(self, tokens: Microbatch, log_probs: Tensor, groups: ParallelGroups) -> Tensor:
        """[t] the tokens of highest covariance; it has to be positive: it is 0 where all advantages are equal."""
        mask = tokens.loss_mask
        covariance = reduce.centred_products(log_probs, tokens.advantages, mask, groups.dp)
        count = int(reduce.all_sum(mask.sum(), groups.dp))
        k = min(count, max(1, int(self.config.share * count)))
        return mask & (covariance > 0) & (covariance >= reduce.kth_largest(covariance, mask, k, groups.dp))
