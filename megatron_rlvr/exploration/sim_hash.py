"""Counts of SimHash codes: a response unlike those that the run has seen earns more.

    b  = sign(A h)                     ``bits`` signs of random projections of the response's hidden state h
    r~ = r + strength / sqrt(n[b])     n[b]: responses of the run with that code, those of this step included

The count-based baseline of CDE (arXiv 2509.09675v1 Sec 3.1, App C), after arXiv 1611.04717. The paper shows with it how
counts concentrate in a few codes (``sim_hash/largest_share``) and gives neither bits nor strength. The hidden states
take a forward pass of their own. A projection near 0 may change its sign between layouts, which add in another order.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_rlvr.config import rule
from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.exploration.base import Exploration, Needs
from megatron_rlvr.metrics import Meter
from megatron_rlvr.seeds import stable_seed
from megatron_rlvr.types import Batch

log = logging.getLogger(__name__)


@dataclass
class Config:
    bits: int = 16  # of a code: 2 ** bits codes there can be
    strength: float = 0.1  # reward of the first response with a code
    projection: Literal["gaussian", "rademacher"] = "gaussian"  # the entries of A: N(0, 1), or -1 and 1
    state: Literal["last", "second_last", "mean"] = "last"  # h: of the last token, the one before, or of all tokens

    def __post_init__(self) -> None:
        name = "exploration.sim_hash"
        rule(
            1 <= self.bits <= 62, f"{name}.bits must be in 1..62, not {self.bits}: a code is a whole number of 64 bits"
        )
        rule(
            self.strength >= 0, f"{name}.strength must be at least 0, not {self.strength}: below 0 it punishes novelty"
        )


class SimHash(Exploration):
    config: Config

    def __init__(self, name: str, config: Config, run: Any = None) -> None:
        super().__init__(name, config, run)
        self.counts: Counter[int] = Counter()

    def needs(self) -> Needs:
        return Needs(states=self.config.state)

    def shape_rewards(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        codes = self.codes(batch.states)
        of_step = reduce.gather_by_index(codes, batch.response_ids, batch.num_step_responses, groups.dp)
        self.counts.update(of_step.tolist())
        seen = torch.tensor([self.counts[code] for code in codes.tolist()]).to(batch.rewards)
        bonus = self.config.strength / seen.sqrt()
        judged = batch.response_lengths > 0
        meter.add("sim_hash/bonus", bonus[judged].sum(), judged.sum())
        meter.add("sim_hash/codes", len(self.counts))
        meter.add("sim_hash/largest_share", max(self.counts.values()) / self.counts.total())
        return batch.rewards + bonus

    def codes(self, states: Tensor) -> Tensor:
        """[S, h] -> [S] int64, whose bits are the signs."""
        generator = torch.Generator().manual_seed(stable_seed(self.run.seed, "sim_hash"))
        drawn = torch.randn(self.config.bits, states.shape[1], generator=generator)
        if self.config.projection == "rademacher":
            drawn = drawn.sign()
        signs = states @ drawn.to(states).T > 0
        return (signs * 2 ** torch.arange(self.config.bits, device=states.device)).sum(1)

    def state_dict(self) -> dict[str, Any]:
        counts = {str(code): count for code, count in self.counts.items()}  # JSON has no other keys
        return {"counts": counts, "codes_of": self._codes_of()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("codes_of") != self._codes_of():  # an earlier version did not say
            log.warning("exploration.sim_hash counts from 0: the checkpoint's codes are those of other options or seed")
            return
        self.counts = Counter({int(code): count for code, count in state["counts"].items()})

    def _codes_of(self) -> list[Any]:
        """Whatever decides on a response's code."""
        return [self.config.bits, self.config.projection, self.config.state, self.run.seed]
