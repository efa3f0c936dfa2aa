"""Correct for an engine whose probabilities differ from the policy's: losses are weighed by w = p_old / p_rollout.

The loss is a mean over tokens drawn from p_old, but the engine drew them from p_rollout, with other kernels and
roundings. No gradient flows through w.

    form            w of                        outside [low, high]
    tis             the token                   truncated
    sequence_tis    the response (product)      truncated
    mis             the token                   0
    sequence_mis    the response                0
    icepop          the token                   0, with both bounds
    geometric_mask  the token                   0 where the geometric mean over the response is outside

The bounds are the defaults of verl (tis, icepop), slime (tis) and NeMo-RL (icepop, geometric_mask, there seq-mask-TIS).
A token of weight 0 stays in the loss's denominator, or leaves it with ``renormalise`` (rejection sampling).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

BOUNDS = {
    "tis": (0.0, 2.0),
    "sequence_tis": (0.0, 2.0),
    "mis": (0.0, 2.0),
    "sequence_mis": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "geometric_mask": (0.999, 1.002),
}


@dataclass
class Config:
    form: Literal["tis", "sequence_tis", "mis", "sequence_mis", "icepop", "geometric_mask"] = "tis"
    low: float | None = None  # None: the form's own bounds, BOUNDS
    high: float | None = None
    renormalise: bool = False  # divide by the tokens of weight above 0 alone; for reduction token_mean

    def __post_init__(self) -> None:
        name, (low, high) = "exploration.rollout_correction", self.bounds
        rule(
            0 <= low <= 1 <= high,
            f"{name}.low={low} and {name}.high={high} must hold 1 between them: it is the weight of a token "
            f"on which engine and policy agree",
        )
        rule(
            not self.renormalise or not self.form.endswith("tis"),
            f"{name}.renormalise has no effect with form={self.form}, which drops no token: leave it out",
        )

    @property
    def bounds(self) -> tuple[float, float]:
        low, high = BOUNDS[self.form]
        return (low if self.low is None else self.low, high if self.high is None else self.high)


class RolloutCorrection(Exploration):
    order = 40
    config: Config
    _scale = 1.0  # loss tokens per token of weight above 0

    def __init__(self, name: str, config: Config, run: RunConfig | None = None) -> None:
        super().__init__(name, config, run)
        self.excludes = "selects_tokens" if config.renormalise else ""

    def needs(self) -> Needs:
        return Needs(old_statistics=self.config.renormalise)

    def prepare_update(self, batch: Batch, update: Update, groups: ParallelGroups) -> None:
        if self.config.renormalise:
            whole = batch.of_update(update)
            kept = whole.loss_mask & (self.weights(whole) > 0)
            total, count = reduce.all_sum(torch.stack([whole.loss_mask.sum(), kept.sum()]), groups.dp).tolist()
            self._scale = total / max(1, count)

    def policy_loss(self, losses: Tensor, micro: Microbatch, current: TokenStatistics, meter: Meter) -> Tensor:
        weights, mask = self.weights(micro), micro.loss_mask
        meter.add("rollout_correction/weight", torch.where(mask, weights, 0.0).sum(), mask.sum())
        meter.add("rollout_correction/dropped", (mask & (weights == 0)).sum(), mask.sum())
        return torch.where(weights > 0, losses * weights * self._scale, 0.0)

    def weights(self, tokens: Microbatch) -> Tensor:
        """[t] of the configured form."""
        gap = torch.where(tokens.loss_mask, tokens.old_log_probs - tokens.rollout_log_probs, 0.0)
        per_response, form = tokens.per_response_sum(gap), self.config.form
        bound = policy_losses.MAX_LOG_RATIO
        weights = gap.clamp(-bound, bound).exp()
        judged = weights
        if form.startswith("sequence"):
            weights = judged = tokens.per_token(per_response.clamp(-bound, bound).exp())
        elif form == "geometric_mask":
            mean = per_response / tokens.response_lengths.clamp(min=1)
            judged = tokens.per_token(mean.clamp(-bound, bound).exp())
        low, high = self.config.bounds
        if form.endswith("tis"):
            return weights.clamp(low, high)
        return torch.where((judged >= low) & (judged <= high), weights, 0.0)
