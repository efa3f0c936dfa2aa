"""Soft overlong punishment: a response that comes near the length limit loses reward (DAPO, arXiv 2503.14476).

    r~ = r + factor * min(0, (limit - buffer - length) / buffer)

The limit is rollout.max_response_length: 0 up to the buffer in front of it, then linearly down to -factor.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_rlvr.config import Config as RunConfig
from megatron_rlvr.config import rule
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.exploration.base import Exploration
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Batch


@dataclass
class Config:
    buffer: int = 4096  # tokens in front of the limit
    factor: float = 1.0  # reward lost at the limit

    def __post_init__(self) -> None:
        name = "exploration.overlong"
        rule(self.buffer >= 1, f"{name}.buffer must be at least 1 token, not {self.buffer}: the penalty grows over it")
        rule(self.factor >= 0, f"{name}.factor must be at least 0, not {self.factor}: below 0 it would reward length")


class Overlong(Exploration):
    order = 10
    config: Config

    def __init__(self, name: str, config: Config, run: RunConfig | None = None) -> None:
        super().__init__(name, config, run)
        limit = self.run.rollout.max_response_length
        rule(
            config.buffer < limit,
            f"exploration.overlong.buffer={config.buffer} must be below rollout.max_response_length={limit}: "
            f"every response would lose reward, however short",
        )

    def shape_rewards(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        free = self.run.rollout.max_response_length - self.config.buffer
        beyond = (free - batch.response_lengths).clamp(max=0) / self.config.buffer
        penalty = self.config.factor * beyond
        judged = (batch.response_lengths > 0).sum()
        meter.add("overlong/penalty", penalty.sum(), judged)
        meter.add("overlong/share", (penalty < 0).sum(), judged)
        return batch.rewards + penalty
