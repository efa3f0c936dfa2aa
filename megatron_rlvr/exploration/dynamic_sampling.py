"""DAPO's dynamic sampling: train only on prompts that some responses solve and others do not (arXiv 2503.14476).

Where every reward of a group is the same, its advantages are 0 and it only dilutes the batch: the step goes on sampling
until it has as many groups as it wants, and gives up after ten generations. The verifier's reward decides, before any
bonus or penalty is added to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlvr.exploration.base import Exploration
from megatron_rlvr.types import RolloutGroup
from megatron_rlvr.verdict import is_scored


@dataclass
class Config:
    """No options."""


class DynamicSampling(Exploration):
    config: Config

    def keep_group(self, group: RolloutGroup) -> bool:
        """A group of one response is kept: it has no other to differ from."""
        verdicts = [rollout.verdict for rollout in group.rollouts]
        rewards = {verdict.reward for verdict in verdicts if is_scored(verdict)}
        return len(verdicts) == 1 or len(rewards) > 1
