"""CDE: a response that surprises its own policy earns a bonus, and so does a token that its critic is unsure about.

    r~  = r + omega_step * min(|r| / kappa, alpha * B),    B = -mean_t ln p_old(o_t)        arXiv 2509.09675v1 Eq 1-2
    A_t = A~_t + omega_step * min(|A~_t| / kappa, alpha * std_j V_j(state after token t))                    Eq 4-5

The actor's B is in nats per response token. A confident error loses more than a doubtful one, and a doubtful success
gains more than a confident one; the cap keeps the sign of r. That bonus joins the reward before advantages are
estimated. The critic's bonus needs a critic with several heads: where they have seen little, they disagree.

Where it does nothing, or more than it seems: a reward of 0 gets no bonus (set reward.scale=signed); from B = 1 / (alpha
kappa) on, every bonus is the cap; in a group that is all right or all wrong the bonus is all that differs, and GRPO,
which divides by the standard deviation, makes advantages of full size of it (bonus_in_degenerate_groups).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_rlvr.config import rule
from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.exploration.base import Exploration, Needs
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Batch

log = logging.getLogger(__name__)


@dataclass
class Bonus:
    """omega * min(|amount| / kappa, alpha * novelty), where omega may decay with the steps."""

    name: ClassVar[str]
    kappa: float = 3.0  # the bonus is at most omega * |amount| / kappa
    alpha: float = 1.0  # bonus per unit of novelty
    omega_0: float = 1.0  # weight of the bonus at step 0
    schedule: Literal["none", "linear", "cosine", "staircase"] = "none"  # how omega decays
    total_steps: int = 0  # linear, cosine: the step at which omega reaches 0
    milestones: list[list[float]] = field(default_factory=list)  # staircase: [step, multiplier of omega_0 from it on]

    def __post_init__(self) -> None:
        name = self.name
        rule(self.kappa > 0, f"{name}.kappa must be above 0, not {self.kappa}: the cap is divided by it")
        rule(self.alpha >= 0, f"{name}.alpha must be at least 0, not {self.alpha}: below 0 it would punish doubt")
        rule(
            0 <= self.omega_0 < self.kappa,
            f"{name}.omega_0 must be in [0, kappa={self.kappa}), not {self.omega_0}: "
            f"a larger bonus would turn a negative reward or advantage positive",
        )
        rule(
            self.schedule not in ("linear", "cosine") or self.total_steps >= 1,
            f"{name}.schedule={self.schedule} needs {name}.total_steps, the step at which omega reaches 0",
        )
        rule(
            self.schedule in ("linear", "cosine") or not self.total_steps,
            f"{name}.total_steps={self.total_steps} is read with schedule=linear or cosine, not {self.schedule}",
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

    def of(self, amount: Tensor, novelty: Tensor, step: int) -> Tensor:
        """The bonus at ``step``, less than |amount|: a sum of both keeps the sign."""
        return self.omega(step) * torch.minimum(amount.abs() / self.kappa, self.alpha * novelty)


@dataclass
class ActorBonus(Bonus):
    """The amount is a reward. The paper's best run drops the bonus in stairs, at steps that only a figure shows."""

    name: ClassVar[str] = "exploration.cde.actor"
    # Whether a group whose rewards are all the same gets it; without, such a group teaches nothing, as in GRPO alone.
    bonus_in_degenerate_groups: bool = True


@dataclass
class CriticBonus(Bonus):
    """The amount is an advantage. The paper lets this bonus stay."""

    name: ClassVar[str] = "exploration.cde.critic"
    alpha: float = 0.5
    # Which advantages it joins, for the paper does not say: whitened, on the scale that the policy's loss sees, or raw.
    order: Literal["after_whitening", "before_whitening"] = "after_whitening"


@dataclass
class Config:
    """Null switches a part off: {critic: {}} has both, {actor: null, critic: {}} the critic's alone."""

    actor: ActorBonus | None = field(default_factory=ActorBonus)
    critic: CriticBonus | None = None

    def __post_init__(self) -> None:
        rule(
            self.actor is not None or self.critic is not None,
            "exploration.cde: actor and critic are both null, so that nothing is left: set one, or drop the method",
        )


class Cde(Exploration):
    config: Config
    _warned = False

    def needs(self) -> Needs:
        return Needs(value_heads=2 if self.config.critic else 0)

    def shape_rewards(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        actor, rewards = self.config.actor, batch.rewards
        if actor is None:
            return rewards
        surprise = batch.per_response_sum(-batch.known_log_probs) / batch.response_lengths.clamp(min=1)
        bonus = actor.of(rewards, surprise, step)
        if not actor.bonus_in_degenerate_groups:
            bonus = torch.where(in_degenerate_group(batch, groups), 0.0, bonus)
        batch.extras["cde/bonus"] = batch.per_token(bonus)
        meter.add("cde/omega", actor.omega(step))
        judged = batch.response_lengths > 0
        meter.add("cde/bonus", bonus.sum(), judged.sum())
        self._look_for_zero_rewards(rewards[judged], groups)
        return rewards + bonus

    def shape_raw_advantages(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        return self._shape(batch, "before_whitening", step, meter)

    def shape_advantages(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        return self._shape(batch, "after_whitening", step, meter)

    def _shape(self, batch: Batch, order: str, step: int, meter: Meter) -> Tensor:
        """The critic's bonus, if this is its place in the ``order``."""
        critic, mask = self.config.critic, batch.loss_mask
        if critic is None or critic.order != order:
            return batch.advantages
        bonus = torch.where(mask, critic.of(batch.advantages, disagreement_after(batch.values), step), 0.0)
        batch.extras["cde/critic_bonus"] = bonus
        meter.add("cde/critic_omega", critic.omega(step))
        meter.add("cde/critic_bonus", bonus.sum(), mask.sum())
        return batch.advantages + bonus

    def _look_for_zero_rewards(self, rewards: Tensor, groups: ParallelGroups) -> None:
        """Warn, once, where every rank's rewards are 0 or 1."""
        zero = rewards == 0
        counts = torch.stack([zero.sum(), (~zero & (rewards != 1)).sum()])
        num_zero, num_other = reduce.all_sum(counts, groups.dp).tolist()
        if not num_zero or num_other or self._warned:
            return
        self._warned = True
        if groups.rank == 0:
            log.warning(
                "exploration.cde: every reward is 0 or 1, and a reward of 0 gets no bonus, so confident errors are not "
                "told from doubtful ones: set reward.scale=signed"
            )


def in_degenerate_group(batch: Batch, groups: ParallelGroups) -> Tensor:
    """[S] bool: whether all responses of the group that were judged, on whichever rank, have the same reward."""
    mine = torch.stack([batch.rewards, (batch.response_lengths > 0).to(batch.rewards)])
    rewards, judged = (
        reduce.gather_by_index(row, batch.response_ids, batch.num_step_responses, groups.dp).view(-1, batch.group_size)
        for row in mine
    )
    highest = torch.where(judged > 0, rewards, -torch.inf).amax(1)
    lowest = torch.where(judged > 0, rewards, torch.inf).amin(1)
    return (highest <= lowest)[batch.response_ids // batch.group_size]


def disagreement_after(values: Tensor) -> Tensor:
    """[T, H] values of the states before each token -> [T] standard deviation over the heads of the state after it.

    Behind the last token of a response there is nothing left to be curious about: its value is 0 to every head, as in
    GAE. (There ``values`` are 0, being outside the loss tokens.) The deviation is the population's: 0 for one head.
    """
    spread = values.std(dim=1, correction=0)
    return torch.cat([spread[1:], spread.new_zeros(1)])
