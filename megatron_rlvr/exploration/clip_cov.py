"""Clip-Cov: leave out a few random tokens of those whose log-prob and advantage vary together strongly.

    cov_t = (A_t - mean A) (ln p_t - mean ln p),   L_t = 0 for a random share of all tokens among low < cov_t < high

arXiv 2505.22617, with share 0.0002 and bounds 1 and 5. Its released code draws in each microbatch, by the current
log-probs, from the tokens that PPO has not clipped (``scope: microbatch``). Over the whole update that is not known
beforehand; a clipped token has no gradient, so leaving it out as well only changes the loss's value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy
import torch
from torch import Tensor

from megatron_rlvr import losses as policy_losses
from megatron_rlvr.config import Config as RunConfig
from megatron_rlvr.config import rule
from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.vocab import TokenStatistics
from megatron_rlvr.exploration.base import Exploration, Needs
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Batch, Microbatch, Update

PER_TOKEN_RATIO = ("ppo", "plain_clip", "unclipped")  # algorithm.loss, which is -A r of a token that is not clipped


@dataclass
class Config:
    share: float = 0.0002  # of all loss tokens; at least one is left out where there is a candidate
    low: float = 1.0  # covariances between these bounds are candidates, in nats times advantage
    high: float = 5.0
    scope: Literal["update", "microbatch"] = "update"  # update: over every rank, by old log-probs

    def __post_init__(self) -> None:
        name = "exploration.clip_cov"
        rule(0 < self.share <= 1, f"{name}.share must be in (0, 1], not {self.share}: it is a share of the tokens")
        rule(self.low < self.high, f"{name}.low={self.low} must be below {name}.high={self.high}: nothing lies between")


class ClipCov(Exploration):
    order = 30
    excludes = "covariance"
    config: Config
    updates = 0  # so far: the draws of each update are its own

    def __init__(self, name: str, config: Config, run: RunConfig | None = None) -> None:
        super().__init__(name, config, run)
        loss = self.run.algorithm.loss
        rule(
            config.scope == "update" or loss in PER_TOKEN_RATIO,
            f"exploration.clip_cov.scope=microbatch draws from tokens whose loss is still -A r, which is no token's "
            f"with algorithm.loss={loss}: set scope=update, or one of {', '.join(PER_TOKEN_RATIO)}",
        )

    def needs(self) -> Needs:
        return Needs(old_statistics=self.config.scope == "update")

    def prepare_update(self, batch: Batch, update: Update, groups: ParallelGroups) -> None:
        self.updates += 1
        if self.config.scope == "update":
            whole = batch.of_update(update)
            drawn = self._draw(whole, whole.old_log_probs, whole.loss_mask, groups)
            batch.keep(update, "clip_cov/left_out", drawn)

    def policy_loss(self, losses: Tensor, micro: Microbatch, current: TokenStatistics, meter: Meter) -> Tensor:
        if self.config.scope == "update":
            left_out = micro.extras["clip_cov/left_out"]
        else:
            r = policy_losses.ratio(current.log_prob, micro.old_log_probs)
            unclipped = micro.loss_mask & (losses == -micro.advantages * r)
            left_out = self._draw(micro, current.log_prob, unclipped, ParallelGroups.single())
        meter.add("clip_cov/share", left_out.sum(), micro.loss_mask.sum())
        return torch.where(left_out, 0.0, losses)

    def _draw(self, tokens: Microbatch, log_probs: Tensor, eligible: Tensor, groups: ParallelGroups) -> Tensor:
        """[t] the tokens that are left out."""
        mask = tokens.loss_mask
        covariance = reduce.centred_products(log_probs, tokens.advantages, mask, groups.dp)
        candidates = eligible & (covariance > self.config.low) & (covariance < self.config.high)
        total, count = reduce.all_sum(torch.stack([mask.sum(), candidates.sum()]), groups.dp).tolist()
        lot, k = self._lots(tokens), min(count, max(1, int(self.config.share * total)))
        return candidates & (lot <= reduce.kth_smallest(lot, candidates, k, groups.dp))

    def _lots(self, tokens: Microbatch) -> Tensor:
        """[t] a random number for each token, the same wherever its response is packed."""
        lengths = (tokens.cu_seqlens[1:] - tokens.cu_seqlens[:-1]).tolist()
        seeds = [(self.run.seed % 2**32, self.updates, response) for response in tokens.response_ids.tolist()]
        rows = [numpy.random.default_rng(seed).random(length) for seed, length in zip(seeds, lengths, strict=True)]
        return torch.from_numpy(numpy.concatenate(rows)).to(tokens.loss_mask.device)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
