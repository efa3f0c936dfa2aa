"""CDE, actor part: a response that surprises its own policy earns a bonus, capped by what it earned.

    r~ = r + omega_step * min(|r| / kappa, alpha * B),   B = -mean_t ln p_old(o_t)        arXiv 2509.09675v1 Eq 1-2

B is in nats per response token. A confident error loses more than a doubtful one, and a doubtful success gains more
than a confident one; the cap keeps the sign of r. The bonus joins the reward before advantages are estimated.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megatron_rlvr.config import rule
from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.exploration.base import Exploration
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Batch

log = logging.getLogger(__name__)


@dataclass
class Config:
    """The paper's best run drops the bonus in stairs, at steps that only a figure shows: give them as milestones."""

    kappa: float = 3.0  # the bonus is at most omega * |r| / kappa
    alpha: float = 1.0  # reward per nat of B
    omega_0: float = 1.0  # weight of the bonus at step 0
    schedule: Literal["none", "linear", "cosine", "staircase"] = "none"  # how omega decays
    total_steps: int = 0  # linear, cosine: the step at which omega reaches 0
    milestones: list[list[float]] = field(default_factory=list)  # staircase: [step, multiplier of omega_0 from it on]

    def __post_init__(self) -> None:
        name = "exploration.cde"
        rule(self.kappa > 0, f"{name}.kappa must be above 0, not {self.kappa}: it divides the reward")
        rule(self.alpha >= 0, f"{name}.alpha must be at least 0, not {self.alpha}: below 0 it would punish doubt")
        rule(
            0 <= self.omega_0 < self.kappa,
            f"{name}.omega_0 must be in [0, kappa={self.kappa}), not {self.omega_0}: "
            f"a larger bonus would turn a negative reward positive",
        )
        rule(
            self.schedule not in ("linear", "cosine") or self.total_steps >= 1,
            f"{name}.schedule={self.schedule} needs {name}.total_steps, the step at which omega reaches 0",
        )
        self._check_milestones(f"{name}.milestones")

    def _check_milestones(self, name: str) -> None:
        rule(
            (self.schedule == "staircase") == bool(self.milestones),
            f"{name} and schedule=staircase go together: set both, as in schedule=staircase milestones=[[100, 0]]",
        )
        for pair in self.milestones:
            rule(
                len(pair) == 2 and 0 <= pair[1] <= 1,
                f"{name} must hold pairs [step, multiplier in [0, 1]], not {pair}",
            )
        steps = [pair[0] for pair in self.milestones]
        rule(steps == sorted(set(steps)), f"{name} must be in the order of their steps, not {self.milestones}")

    def omega(self, step: int) -> float:
        """Weight of the bonus at ``step``, counted from 0."""
        if self.schedule == "staircase":
            reached = [multiplier for start, multiplier in self.milestones if step >= start]
            return self.omega_0 * (reached[-1] if reached else 1.0)
        if self.schedule == "none":
            return self.omega_0
        done = min(step / self.total_steps, 1.0)
        return self.omega_0 * (1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


class Cde(Exploration):
    config: Config
    _warned = False

    def shape_rewards(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        config, rewards = self.config, batch.rewards
        surprise = batch.per_response_sum(-batch.known_log_probs) / batch.response_lengths.clamp(min=1)
        omega = config.omega(step)
        bonus = omega * torch.minimum(rewards.abs() / config.kappa, config.alpha * surprise)
        meter.add("cde/omega", omega)
        meter.add("cde/bonus", bonus.sum(), bonus.numel())
        self._record(rewards, surprise.exp(), groups, meter)
        return rewards + bonus

    def _record(self, rewards: Tensor, perplexity: Tensor, groups: ParallelGroups, meter: Meter) -> None:
        """Perplexity of right and wrong responses over every rank; at a gap of 0 calibration has collapsed."""
        right, zero = rewards > 0, rewards == 0
        of_right, of_wrong = torch.where(right, perplexity, 0.0), torch.where(right, 0.0, perplexity)
        sums = [right, ~right, of_right, of_wrong, zero, zero | (rewards == 1)]
        totals = torch.stack([item.double().sum() for item in sums])
        num_right, num_wrong, sum_right, sum_wrong, num_zero, num_binary = reduce.all_sum(totals, groups.dp).tolist()
        if num_right:
            meter.add("cde/perplexity_right", sum_right / num_right)
        if num_wrong:
            meter.add("cde/perplexity_wrong", sum_wrong / num_wrong)
        if num_right and num_wrong:
            meter.add("cde/calibration_gap", sum_wrong / num_wrong - sum_right / num_right)
        if num_zero and num_binary == num_right + num_wrong:
            self._warn_zero_rewards(groups)

    def _warn_zero_rewards(self, groups: ParallelGroups) -> None:
        if not self._warned and groups.rank == 0:
            log.warning(
                "exploration.cde: every reward is 0 or 1, and a reward of 0 gets no bonus, so confident errors are not "
                "told from doubtful ones: set reward.scale=signed"
            )
        self._warned = True
