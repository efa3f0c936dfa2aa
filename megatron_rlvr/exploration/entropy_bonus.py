"""Entropy bonus: reward the policy for being undecided at every token, L_t = L_t - coefficient * H(p_t).

The oldest remedy against entropy collapse; a baseline of Lp-Reg (arXiv 2510.03222v2 Sec 5.1.2, coefficient 0.002).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlvr.config import rule
from megatron_rlvr.distributed.vocab import TokenStatistics
from megatron_rlvr.exploration.base import Exploration
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Microbatch


@dataclass
class Config:
    coefficient: float = 0.002  # loss per nat of entropy

    def __post_init__(self) -> None:
        rule(
            self.coefficient >= 0,
            f"exploration.entropy_bonus.coefficient must be at least 0, not {self.coefficient}: "
            f"below 0 it would reward certainty",
        )


class EntropyBonus(Exploration):
    """Entropy of the whole vocabulary at the sampling temperature, with its gradient."""

    order = 80  # adds to every token, so it comes after a method that replaces the loss of some
    config: Config

    def policy_loss(self, losses: Tensor, micro: Microbatch, current: TokenStatistics, meter: Meter) -> Tensor:
        bonus = self.config.coefficient * current.entropy
        meter.add("entropy_bonus/bonus", torch.where(micro.loss_mask, bonus, 0.0).sum(), micro.loss_mask.sum())
        return losses - bonus
