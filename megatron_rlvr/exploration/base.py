"""The hooks of an exploration method, and how the methods of a config become one object.

A method is one file here, found by its name: ``exploration/lp_reg.py`` holds one subclass of Exploration and a
dataclass ``Config`` with its options. Nothing else has to list it for it to run.

    exploration = build({"lp_reg": {"rho": 0.01}, "cde": {}}, config)

How methods compose, in the order of ``order``; each hook of the step passes through all of them:

    10  shapes rewards by length             overlong
    20  replaces losses of some tokens       lp_reg            one at most: the later would undo the earlier
    30  penalises or drops by covariance     kl_cov, clip_cov  one at most: two readings of the same tokens
    40  weighs by training / rollout prob    rollout_correction
    50  shapes rewards or advantages         cde, sim_hash
    60  selects the tokens that train        high_entropy, stapo    one at most: each divides by the tokens it keeps
    80  adds to every token                  entropy_bonus

What may not run together says so in ``excludes``: two methods with the same word there are refused, with the reason.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlvr import exploration
from megatron_rlvr.config import Config, ConfigError, from_dict, rule, to_dict
from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.vocab import StatisticsOptions, TokenStatistics
from megatron_rlvr.loading import loading
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

    # Of the old policy over the whole batch, before the first loss. With one update per rollout nothing else asks for
    # that pass: the training forward's own policy is still the old one, and batch.known_log_probs are the rollout's.
    old_statistics: bool = False
    reference: bool = False  # ref_log_probs, and the reference policy's statistics in ``annotate``
    threshold: Threshold | None = None
    value_heads: int = 0  # heads that the critic must have at least; 0: no critic
    old_top: int = 0  # most probable kept tokens of the old policy, for the KL to the current one
    rollout_top: int = 0  # most probable tokens of the engine's distribution, for ``annotate_sample``
    states: str = ""  # batch.states of the old policy, of that kind: last, second_last, mean

    def merge(self, other: Needs) -> Needs:
        """Both needs at once. Raises ConfigError: two different thresholds or states, where one pass takes one."""
        if self.threshold and other.threshold and self.threshold != other.threshold:
            raise ConfigError(
                f"exploration: two methods ask for different thresholds ({self.threshold} and {other.threshold}), but "
                f"one pass over the vocabulary computes one kept mass: give them the same options or drop one"
            )
        if self.states and other.states and self.states != other.states:
            raise ConfigError(
                f"exploration: two methods ask for different states of a response ({self.states} and {other.states}), "
                f"but a step keeps one: give them the same or drop one"
            )
        return Needs(
            old_statistics=self.old_statistics or other.old_statistics,
            reference=self.reference or other.reference,
            threshold=self.threshold or other.threshold,
            value_heads=max(self.value_heads, other.value_heads),
            old_top=max(self.old_top, other.old_top),
            rollout_top=max(self.rollout_top, other.rollout_top),
            states=self.states or other.states,
        )

    def statistics(self, temperature: float) -> StatisticsOptions:
        """Options of the vocabulary statistics at the sampling ``temperature``."""
        if self.threshold is None:
            return StatisticsOptions(temperature=temperature, top=self.old_top)
        return StatisticsOptions(
            temperature=temperature,
            min_p=self.threshold.min_p,
            tau=self.threshold.tau,
            threshold_temperature=self.threshold.temperature or temperature,
            top=self.old_top,
        )


EXCLUSIONS = {
    "replaces_losses": "each replaces the loss of the tokens it selects, so on a token that both select the later one "
    "would undo the other",
    "covariance": "each acts on the tokens of high covariance, one by a penalty and the other by dropping them",
    "selects_tokens": "each divides by the number of tokens that it keeps, which is not the number that both keep",
}


class Exploration:
    """Hooks in the order of the step; the defaults change nothing.

    S responses and T tokens are on this data-parallel rank, t tokens in a microbatch. Every rank calls every hook, save
    ``policy_loss``, which runs where the logits are: on the last pipeline stage.
    """

    order: int = 50  # methods run by ascending order
    excludes: str = ""  # a key of EXCLUSIONS: of the methods with the same one, only one may run

    def __init__(self, name: str, config: Any = None, run: Config | None = None) -> None:
        """``config``: the method's own options; ``run``: the whole run's, for what depends on it."""
        self.name = name
        self.config = config
        self.run = run or Config()

    def needs(self) -> Needs:
        return Needs()

    def annotate_sample(self, log_probs: list[float], top_log_probs: list[list[float]]) -> dict[str, list[float]]:
        """Numbers to keep for each token of a sampled response, in ``batch.extras`` by these names.

        log_probs [n] of the sampled tokens, top_log_probs [n][K or K + 1] of the most probable ones in descending
        order, the sampled token's among them. Called with Needs.rollout_top, on one rank of an engine replica.
        """
        return {}

    def keep_group(self, group: RolloutGroup) -> bool:
        """Whether a scored group is trained on."""
        return True

    def annotate(
        self, batch: Batch, old: TokenStatistics, reference: TokenStatistics | None = None
    ) -> dict[str, Tensor]:
        """[T] tensors to keep from the old policy's statistics, stored in ``batch.extras`` by these names.

        ``reference``: the reference policy's statistics, for a method that needs them. Not called where the old policy
        has no pass of its own (Needs.old_statistics).
        """
        return {}

    def shape_rewards(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        """[S] rewards, before advantages are estimated from them; ``step`` counts from 0."""
        return batch.rewards

    def shape_raw_advantages(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        """[T] advantages of GAE, in units of reward, before they are whitened over the batch."""
        return batch.advantages

    def shape_advantages(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        """[T] advantages, as the policy's loss takes them."""
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


class TokenSelection(Exploration, ABC):
    """A method that trains on some of the tokens: the others lose their loss and their place in the denominator.

    Under ``reduction: token_mean`` the loss is then the mean over the selected tokens of the update; a reduction by
    response keeps each response's share of the denominator and is scaled as a whole.
    """

    order = 60
    excludes = "selects_tokens"

    def needs(self) -> Needs:
        return Needs(old_statistics=True)

    @abstractmethod
    def select(self, tokens: Microbatch, groups: ParallelGroups) -> Tensor:
        """[t] bool, from what is known before the update; ``tokens`` is this rank's part of it."""

    def prepare_update(self, batch: Batch, update: Update, groups: ParallelGroups) -> None:
        batch.keep(update, f"{self.name}/weight", self.weights(batch.of_update(update), groups))

    def policy_loss(self, losses: Tensor, micro: Microbatch, current: TokenStatistics, meter: Meter) -> Tensor:
        return self.weigh(losses, micro, micro.extras[f"{self.name}/weight"], meter)

    def weights(self, tokens: Microbatch, groups: ParallelGroups) -> Tensor:
        """[t]: 0, or loss tokens per selected token over every data-parallel rank."""
        selected = tokens.loss_mask & self.select(tokens, groups)
        count, kept = reduce.all_sum(torch.stack([tokens.loss_mask.sum(), selected.sum()]), groups.dp)
        return selected * (count / kept.clamp(min=1))

    def weigh(self, losses: Tensor, micro: Microbatch, weights: Tensor, meter: Meter) -> Tensor:
        meter.add(f"{self.name}/left_out", (micro.loss_mask & (weights == 0)).sum(), micro.loss_mask.sum())
        return torch.where(weights > 0, weights * losses, 0.0)


class _Named(Meter):
    """A meter that takes a method's own metrics alone: by another name it would overwrite the run's figures."""

    def __init__(self, meter: Meter, method: str) -> None:
        super().__init__()
        self.meter, self.method = meter, method

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1) -> None:
        _check_name(self.method, "a metric", name)
        self.meter.add(name, total, count)

    def maximum(self, name: str, value: Tensor | float) -> None:
        _check_name(self.method, "a metric", name)
        self.meter.maximum(name, value)


def _check_name(method: str, what: str, name: str) -> None:
    if not name.startswith(f"{method}/"):
        raise ValueError(f"exploration/{method}.py: {what} must be called {method}/..., not {name!r}")


def _checked(method: Exploration, hook: str, found: Any, like: Tensor, finite: bool = False) -> Tensor:
    """What a hook returned. Raises ValueError: another shape, which would be broadcast; if ``finite``, NaN or inf."""
    file = f"exploration/{method.name}.py"
    if not isinstance(found, Tensor) or found.shape != like.shape:
        what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{file}: {hook} must return a tensor of shape {list(like.shape)}, not {what}")
    if finite and not found.isfinite().all():
        raise ValueError(f"{file}: {hook} returned {found[~found.isfinite()][0]:g}: the policy would be destroyed")
    return found


class Composite(Exploration):
    """Several methods as one: each hook passes through them by ascending ``order``; no method changes nothing.

    What a method returns is checked, for a wrong shape or name would train or record something else in silence.
    """

    def __init__(self, methods: list[Exploration]) -> None:
        super().__init__("composite")
        self.methods = sorted(methods, key=lambda method: (method.order, method.name))
        for kind, reason in EXCLUSIONS.items():
            names = [method.name for method in self.methods if method.excludes == kind]
            rule(len(names) < 2, f"exploration: {' and '.join(names)} cannot run together: {reason}; keep one of them")
        self.needs()  # refuses thresholds that differ

    def needs(self) -> Needs:
        merged = Needs()
        for method in self.methods:
            merged = merged.merge(method.needs())
        return merged

    def annotate_sample(self, log_probs: list[float], top_log_probs: list[list[float]]) -> dict[str, list[float]]:
        kept: dict[str, list[float]] = {}
        for method in self.methods:
            found = method.annotate_sample(log_probs, top_log_probs)
            for name, values in found.items():
                _check_name(method.name, "what annotate_sample keeps", name)
                if len(values) != len(log_probs):
                    raise ValueError(
                        f"exploration/{method.name}.py: annotate_sample[{name!r}] must have a number for each of the "
                        f"{len(log_probs)} tokens, not {len(values)}"
                    )
            kept |= found
        return kept

    def keep_group(self, group: RolloutGroup) -> bool:
        return all(method.keep_group(group) for method in self.methods)

    def annotate(
        self, batch: Batch, old: TokenStatistics, reference: TokenStatistics | None = None
    ) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for method in self.methods:
            found = method.annotate(batch, old, reference)
            for name, values in found.items():
                _check_name(method.name, "what annotate keeps", name)
                _checked(method, f"annotate[{name!r}]", values, batch.loss_mask)
            kept |= found
        return kept

    def shape_rewards(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        batch = copy.copy(batch)  # the next method sees the shaped rewards, the caller's batch stays as it is
        for method in self.methods:
            found = method.shape_rewards(batch, groups, step, _Named(meter, method.name))
            batch.rewards = _checked(method, "shape_rewards", found, batch.rewards, finite=True)
        return batch.rewards

    def shape_raw_advantages(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        batch = copy.copy(batch)
        for method in self.methods:
            found = method.shape_raw_advantages(batch, groups, step, _Named(meter, method.name))
            batch.advantages = _checked(method, "shape_raw_advantages", found, batch.advantages, finite=True)
        return batch.advantages

    def shape_advantages(self, batch: Batch, groups: ParallelGroups, step: int, meter: Meter) -> Tensor:
        batch = copy.copy(batch)
        for method in self.methods:
            found = method.shape_advantages(batch, groups, step, _Named(meter, method.name))
            batch.advantages = _checked(method, "shape_advantages", found, batch.advantages, finite=True)
        return batch.advantages

    def prepare_update(self, batch: Batch, update: Update, groups: ParallelGroups) -> None:
        for method in self.methods:
            method.prepare_update(batch, update, groups)

    def policy_loss(self, losses: Tensor, micro: Microbatch, current: TokenStatistics, meter: Meter) -> Tensor:
        for method in self.methods:
            before = set(micro.extras)
            found = method.policy_loss(losses, micro, current, _Named(meter, method.name))
            losses = _checked(method, "policy_loss", found, losses)
            for name in micro.extras.keys() - before:
                _check_name(method.name, "what policy_loss keeps in extras", name)
                _checked(method, f"policy_loss: extras[{name!r}]", micro.extras[name], micro.loss_mask)
        return losses

    def state_dict(self) -> dict[str, Any]:
        return {method.name: method.state_dict() for method in self.methods}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A method that the state does not know is new in a run whose config was changed on purpose."""
        for method in self.methods:
            if method.name in state:
                method.load_state_dict(state[method.name])


def method_names() -> list[str]:
    """The methods there are: the files of this package, in every folder of its ``__path__``."""
    return sorted(module.name for module in pkgutil.iter_modules(exploration.__path__) if module.name != "base")


def build(settings: dict[str, dict], run: Config | None = None) -> Composite:
    """Method name -> its options, as in the config's ``exploration``; ``run`` is that config, the defaults if None.

    Raises ConfigError: an unknown method or option (with the closest known one), an option that breaks its rule, or
    methods that cannot run together or with the rest of the config (with the reason).
    """
    return Composite([_build_one(name, options, run) for name, options in settings.items()])


def filled(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """A method's options as plain values, with its defaults and presets. Raises ConfigError as ``build`` does.

    filled("high_entropy", {"share": 0.1}) == {"share": 0.1, "scope": "update"}
    """
    return to_dict(from_dict(_module(name).Config, options, path=f"exploration.{name}"))


def all_filled(settings: dict[str, dict]) -> dict[str, dict]:
    """The config's ``exploration`` with every option of its methods, as ``filled`` gives them."""
    return {name: filled(name, options) for name, options in settings.items()}


def _build_one(name: str, options: dict, run: Config | None) -> Exploration:
    module = _module(name)
    classes = [item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__]
    methods = [item for item in classes if issubclass(item, Exploration)]
    rule(
        len(methods) == 1,
        f"exploration/{name}.py must hold one subclass of Exploration, not {len(methods)}: the file is the method",
    )
    (method,) = methods
    config = from_dict(module.Config, options, path=f"exploration.{name}")
    with loading(f"exploration method {name!r}", Path(module.__file__)):
        return method(name, config, run)


def _module(name: str) -> Any:
    known = method_names()
    if name not in known:
        closest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]  # YAML reads 1 and true as such
        raise ConfigError(
            f"unknown exploration method {name!r}; did you mean {closest!r}? There are: {', '.join(known)}"
        )
    full_name = f"{exploration.__name__}.{name}"
    spec = importlib.util.find_spec(full_name)
    assert spec is not None and spec.origin is not None  # it is among the known
    with loading(f"exploration method {name!r}", Path(spec.origin)):
        module = importlib.import_module(full_name)
    rule(
        is_dataclass(getattr(module, "Config", None)),
        f"exploration/{name}.py has no dataclass named Config: it holds the method's options, if any",
    )
    return module
