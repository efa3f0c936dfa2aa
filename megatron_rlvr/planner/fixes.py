"""The smallest change of a config that can run, found by trying; and all layouts that can, best first.

A candidate counts only if nothing in problems.py speaks against it, so a fix that is named is a fix that passes.
"""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from operator import attrgetter
from typing import Any

from megatron_rlvr.config import Config
from megatron_rlvr.planner.memory import fullest, predict
from megatron_rlvr.planner.problems import Machine, problems
from megatron_rlvr.planner.times import Lengths, phases
from megatron_rlvr.planner.workload import Workload

Change = dict[str, Any]  # dotted key -> value


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits: what to set, seconds of a step and bytes of the fullest rank, both predicted."""

    change: Change
    step_seconds: float
    peak: int


def apply(config: Config, change: Change) -> Config:
    """A copy of the config with these keys set."""
    changed = copy.deepcopy(config)
    for key, value in change.items():
        section, _, leaf = key.rpartition(".")
        setattr(attrgetter(section)(changed), leaf, value)
    return changed


def find_fix(config: Config, workload: Workload, machine: Machine) -> Change | None:
    """The change that touches least: layout before memory before what the algorithm sees; one group before two.

    Another cp comes last of all: its attention is slower on a GPU than Transformer Engine's, by what is not known.
    """
    groups = [list(group(config, workload, machine)) for group in GROUPS]
    tries = [*((group,) for group in groups), *combinations(groups, 2)]
    changes = [dict(ChainMap(*reversed(parts))) for chosen in tries for parts in product(*chosen)]
    for change in sorted(changes, key=lambda change: "parallel.cp" in change):
        if not problems(apply(config, change), workload, machine):
            return change
    return None


def _same_layout_switches(config: Config, workload: Workload, machine: Machine) -> Iterator[Change]:
    """Keys that only make sense with others of the layout."""
    yield {"parallel.vpp": 1}
    yield {"parallel.sequence_parallel": config.parallel.tp > 1}
    known = _near([tp for tp in _divisors(machine.gpus) if tp <= machine.device.per_node], config.rollout_tp)
    yield from ({"rollout.tp": tp} for tp in known)


def _layouts(config: Config, workload: Workload, machine: Machine) -> Iterator[Change]:
    """Every tp x cp x pp x dp of the GPUs, the nearest to the one asked for first; tp x cp within a node."""
    asked = config.parallel
    found = [
        (tp, pp, cp, machine.gpus // cp // tp // pp)
        for tp in _divisors(machine.gpus)
        for cp in _divisors(machine.gpus // tp)
        for pp in _divisors(machine.gpus // tp // cp)
        if tp * cp <= machine.device.per_node and workload.policy.num_layers % pp == 0
    ]

    def distance(tp: int, pp: int, cp: int, dp: int) -> tuple[bool, int]:
        far = abs(tp - asked.tp) + 2 * abs(pp - asked.pp) + 2 * abs(cp - asked.cp)
        return (tp, pp, cp) != (asked.tp, asked.pp, asked.cp), far

    for tp, pp, cp, dp in sorted(found, key=lambda item: distance(*item)):
        change = {"parallel.tp": tp, "parallel.cp": cp, "parallel.pp": pp, "parallel.dp": dp}
        if tp == 1 and asked.sequence_parallel:
            change["parallel.sequence_parallel"] = False
        if pp == 1 and asked.vpp > 1:
            change["parallel.vpp"] = 1
        yield {key: value for key, value in change.items() if attrgetter(key)(config) != value}


def _memory(config: Config, workload: Workload, machine: Machine) -> Iterator[Change]:
    shares = [round(0.05 * step, 2) for step in range(2, 19)]
    yield from (
        {"rollout.gpu_memory_utilization": share} for share in _near(shares, config.rollout.gpu_memory_utilization)
    )
    if config.model.recompute != "full":
        yield {"model.recompute": "full"}
    tokens = config.trainer.microbatch_tokens
    while tokens // 2 >= config.longest:
        tokens //= 2
        yield {"trainer.microbatch_tokens": tokens}
    if not config.optimizer.distributed:
        yield {"optimizer.distributed": True}


def _batch(config: Config, workload: Workload, machine: Machine) -> Iterator[Change]:
    """What the algorithm sees, hence last."""
    rollout = config.rollout
    if config.trainer.microbatch_tokens < config.longest:
        yield {"trainer.microbatch_tokens": config.longest}
    yield from (
        {"trainer.updates_per_rollout": count}
        for count in _near(_divisors(rollout.prompts_per_step), config.trainer.updates_per_rollout)
    )
    more = {-(-rollout.prompts_per_step // count) * count for count in _divisors(machine.gpus)}
    updates = max(1, config.trainer.updates_per_rollout)
    more.add(-(-rollout.prompts_per_step // updates) * updates)
    yield from ({"rollout.prompts_per_step": prompts} for prompts in _near(list(more), rollout.prompts_per_step))
    room = workload.policy.max_positions - config.data.max_prompt_length
    if 0 < room < rollout.max_response_length:
        yield {"rollout.max_response_length": room}


GROUPS: list[Callable[[Config, Workload, Machine], Iterator[Change]]] = [
    _same_layout_switches,
    _layouts,
    _memory,
    _batch,
]


def suggestions(config: Config, workload: Workload, machine: Machine, lengths: Lengths, most: int) -> list[Suggestion]:
    """The ``most`` quickest layouts of these GPUs that fit, by predicted seconds of a step, then by memory.

    All have the cp that is asked for, for the reason that ``find_fix`` has.
    """
    layouts = _layouts(config, workload, machine)
    same = [layout for layout in layouts if apply(config, layout).parallel.cp == config.parallel.cp]
    found = [_best(config, layout, workload, machine, lengths) for layout in same]
    fitting = [item for item in found if item is not None]
    return sorted(fitting, key=lambda item: (item.step_seconds, item.peak))[:most]


def _best(config: Config, layout: Change, workload: Workload, machine: Machine, lengths: Lengths) -> Suggestion | None:
    """The quickest choice of recomputation and engine ranks for the config in this layout."""
    found, parallel = [], apply(config, layout).parallel
    for recompute in ("none", "full"):
        for rollout_tp in (tp for tp in _divisors(machine.gpus) if tp <= min(8, machine.device.per_node)):
            change = {
                **{f"parallel.{name}": getattr(parallel, name) for name in ("tp", "cp", "pp", "dp")},
                **layout,
                "parallel.sequence_parallel": parallel.tp > 1,
                "model.recompute": recompute,
                "rollout.tp": rollout_tp,
            }
            changed = apply(config, change)
            if not problems(changed, workload, machine):
                seconds = sum(phase.expected for phase in phases(changed, workload, machine.device, lengths))
                memory = fullest(predict(changed, workload, machine.device))
                peak = max(memory.training_peak, memory.generation_peak)
                found.append(Suggestion(change, seconds, peak))
    return min(found, key=lambda item: (item.step_seconds, item.peak), default=None)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _near(values: list[Any], target: float) -> list[Any]:
    """Without the target itself, the nearest first."""
    return sorted((value for value in values if value != target), key=lambda value: abs(value - target))
