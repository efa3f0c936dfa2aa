"""The hooks of an exploration method, and how the methods of a config become one object.

A method is one file here, found by its name: ``exploration/lp_reg.py`` holds one subclass of Exploration and a
dataclass ``Config`` with its options. Nothing else lists it.

    exploration = build({"lp_reg": {"rho": 0.01}, "cde": {}}, updates_per_rollout=4)
"""

from __future__ import annotations

import copy
import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_rlvr import exploration
from megatron_rlvr.config import ConfigError, from_dict
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.vocab import StatisticsOptions, TokenStatistics
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Batch, Microbatch, RolloutGroup, Update


@dataclass(frozen=True)
class Threshold:
    """Which tokens of the vocabulary count as kept: p >= min_p * max p, or p >= tau. Exactly one of the two is set.

    Threshold(min_p=0.02) is taken on the sampling distribution: ``temperature`` 0 stands for the sampling temperature.
    """

    min_p: float | None = None
    tau: float | None = None
    temperature: float = 0.0


@dataclass(frozen=True)
class Needs:
    """What a method reads, and so which passes the step has to make and what they compute."""

    # Of the old policy over the whole batch, before the loss: its entropy or kept mass, or exactly its log-probs. With
    # one update per rollout nothing else asks for that pass: the training forward's own policy is still the old one,
    # and batch.known_log_probs are the rollout's.
    old_statistics: bool = False
    threshold: Threshold | None = None

    def merge(self, other: Needs) -> Needs:
        """Both needs at once. Raises ConfigError: two different thresholds, where one pass takes one."""
        if self.threshold and other.threshold and self.threshold != other.threshold:
            raise ConfigError(
                f"exploration: two methods ask for different thresholds ({self.threshold} and {other.threshold}), but "
                f"one pass over the vocabulary computes one kept mass: give them the same options or drop one"
            )
        return Needs(
            old_statistics=self.old_statistics or other.old_statistics,
            threshold=self.threshold or other.threshold,
        )

    def statistics(self, temperature: float) -> StatisticsOptions:
        """Options of the vocabulary statistics at the sampling ``temperature``."""
        if self.threshold is None:
            return StatisticsOptions(temperature=temperature)
        return StatisticsOptions(
            temperature=temperature,
            min_p=self.threshold.min_p,
            tau=self.threshold.tau,
            threshold_temperature=self.threshold.temperature or temperature,
        )


class Exploration:
    """Hooks in the order of the step; the defaults change nothing.

    S responses and T tokens are on this data-parallel rank, t tokens in a microbatch. Every rank calls every hook, save
    ``policy_loss``, which runs where the logits are: on the last pipeline stage.
    """

    order: int = 50  # methods run by ascending order
    replaces_loss: bool = False  # policy_loss overwrites entries instead of adding to them

    def __init__(self, name: str, config: Any = None, updates_per_rollout: int = 1) -> None:
        self.name = name
        self.config = config
        self.updates_per_rollout = updates_per_rollout

    def needs(self) -> Needs:
        return Needs()

    def keep_group(self, group: RolloutGroup) -> bool:
        """Whether a scored group is trained on."""
        return True

    def annotate(self, batch: Batch, old: TokenStatistics) -> dict[str, Tensor]:
        """[T] tensors to keep from the old policy's statistics, stored in ``batch.extras`` by these names.

        Not called where the old policy has no pass of its own (Needs.old_statistics).
        """
        return {}

    def shape_rewards(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        """[S] rewards, before advantages are estimated from them; ``step`` counts from 0."""
        return batch.rewards

    def shape_advantages(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        """[T] advantages."""
        return batch.advantages

    def prepare_update(self, batch: Batch, update: Update, groups: ParallelGroups) -> None:
        """Take what is defined over the whole update (a quantile, a covariance) from what is known before it."""

    def policy_loss(self, losses: Tensor, micro: Microbatch, current: TokenStatistics, meter: Meter) -> Tensor:
        """[t] losses -> [t] losses; a weighted sum of them is the global loss (losses.reduction_weights)."""
        return losses

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to remember."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what state_dict gave."""


class Composite(Exploration):
    """Several methods as one: each hook passes through them by ascending ``order``; no method changes nothing."""

    def __init__(self, methods: list[Exploration]) -> None:
        super().__init__("composite")
        self.methods = sorted(methods, key=lambda method: (method.order, method.name))
        replacing = [method.name for method in self.methods if method.replaces_loss]
        if len(replacing) > 1:
            raise ConfigError(
                f"exploration: {' and '.join(replacing)} cannot run together: each replaces the loss of the tokens it "
                f"selects, so on a token that both select the later one would undo the other; keep one of them"
            )
        self.needs()  # refuses thresholds that differ

    def needs(self) -> Needs:
        merged = Needs()
        for method in self.methods:
            merged = merged.merge(method.needs())
        return merged

    def keep_group(self, group: RolloutGroup) -> bool:
        return all(method.keep_group(group) for method in self.methods)

    def annotate(self, batch: Batch, old: TokenStatistics) -> dict[str, Tensor]:
        return {name: tensor for method in self.methods for name, tensor in method.annotate(batch, old).items()}

    def shape_rewards(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        batch = copy.copy(batch)  # the next method sees the shaped rewards, the caller's batch stays as it is
        for method in self.methods:
            batch.rewards = method.shape_rewards(batch, groups, step, meter)
        return batch.rewards

    def shape_advantages(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        batch = copy.copy(batch)
        for method in self.methods:
            batch.advantages = method.shape_advantages(batch, groups, step, meter)
        return batch.advantages

    def prepare_update(self, batch: Batch, update: Update, groups: ParallelGroups) -> None:
        for method in self.methods:
            method.prepare_update(batch, update, groups)

    def policy_loss(self, losses: Tensor, micro: Microbatch, current: TokenStatistics, meter: Meter) -> Tensor:
        for method in self.methods:
            losses = method.policy_loss(losses, micro, current, meter)
        return losses

    def state_dict(self) -> dict[str, Any]:
        return {method.name: method.state_dict() for method in self.methods}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for method in self.methods:
            method.load_state_dict(state[method.name])


def method_names() -> list[str]:
    """The methods there are: the files of this package, in every folder of its ``__path__``."""
    return sorted(module.name for module in pkgutil.iter_modules(exploration.__path__) if module.name != "base")


def build(settings: dict[str, dict], updates_per_rollout: int = 1) -> Composite:
    """Method name -> its options, as in the config's ``exploration``.

    Raises ConfigError: an unknown method or option (with the closest known one), an option that breaks its rule, or
    methods that cannot run together (with the reason).
    """
    return Composite([_build_one(name, options, updates_per_rollout) for name, options in settings.items()])


def _build_one(name: str, options: dict, updates_per_rollout: int) -> Exploration:
    known = method_names()
    if name not in known:
        closest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"unknown exploration method {name!r}; did you mean {closest!r}? There are: {', '.join(known)}"
        )
    module = importlib.import_module(f"{exploration.__name__}.{name}")
    classes = [item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__]
    (method,) = [item for item in classes if issubclass(item, Exploration)]
    return method(name, from_dict(module.Config, options, path=f"exploration.{name}"), updates_per_rollout)
