"""A plan: whether a config fits its GPUs, what would, and what the run will take. Everything in it is predicted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.config import Config, ConfigError, from_dict
from megatron_rlvr.config_reading import apply_override, read_tree
from megatron_rlvr.planner import memory, times
from megatron_rlvr.planner.devices import DEVICES
from megatron_rlvr.planner.fixes import Change, Suggestion, find_fix, suggestions
from megatron_rlvr.planner.memory import Item, Memory
from megatron_rlvr.planner.problems import Machine, problems
from megatron_rlvr.planner.times import Lengths, PhaseTime
from megatron_rlvr.planner.workload import Workload, whole_parameters

SUGGESTIONS = 5


@dataclass(frozen=True)
class Plan:
    """``problems`` is empty where the config fits; only then are there memory, phases and totals."""

    config: Config
    workload: Workload
    machine: Machine
    lengths: Lengths
    problems: list[str]
    fix: Change | None
    suggestions: list[Suggestion]
    memory: Memory | None = None
    phases: tuple[PhaseTime, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def step_seconds(self) -> tuple[float, float]:
        """(floor, expected) of one training step."""
        return sum(phase.floor for phase in self.phases), sum(phase.expected for phase in self.phases)

    @property
    def host_memory(self) -> tuple[Item, ...]:
        """Of the fullest node."""
        ranks = min(self.machine.gpus, self.machine.device.per_node)
        return memory.host_memory(self.config, self.workload, self.machine.device, ranks)

    @property
    def gpu_hours(self) -> tuple[float, float]:
        """(floor, expected) of all steps, without evaluation, verifiers that outlast generation, and start-up."""
        scale = self.config.trainer.num_steps * self.machine.gpus / 3600
        floor, expected = self.step_seconds
        return floor * scale, expected * scale

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json; every figure is predicted."""
        floor, expected = self.step_seconds
        found: dict[str, Any] = {
            "predicted": True,
            "fits": self.fits,
            "gpus": self.machine.gpus,
            "gpu": self.machine.device.name,
            "model": self.workload.source,
            "parameters": whole_parameters(self.workload.policy),
            "problems": self.problems,
            "fix": self.fix,
            "suggestions": [dataclasses.asdict(item) for item in self.suggestions],
        }
        if self.memory is None:
            return found
        return found | {
            "memory": dataclasses.asdict(self.memory)
            | {"training_peak": self.memory.training_peak, "generation_peak": self.memory.generation_peak},
            "memory_per_rank": self.machine.memory,
            "host_memory": [dataclasses.asdict(item) for item in self.host_memory],
            "microbatches_per_update": self.config.most_microbatches,
            "bubble": times.bubble(self.config),
            "sync_bytes": times.sync_bytes(self.config, self.workload),
            "lengths": dataclasses.asdict(self.lengths),
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
            "step_seconds": {"floor": floor, "expected": expected},
            "gpu_hours": dict(zip(("floor", "expected"), self.gpu_hours, strict=True)),
        }


def make_plan(
    path: str | Path,
    overrides: list[str] | tuple[str, ...],
    gpus: int,
    gpu: str,
    prompt_tokens: float = 0.0,
    response_tokens: float = 0.0,
    gpus_per_node: int = 0,
) -> Plan:
    """Read the config, which may break its own rules, and judge it on ``gpus`` of kind ``gpu``.

    ``prompt_tokens`` and ``response_tokens`` are the means that times rest on; 0: an eighth and a half of the longest.
    ``gpus_per_node`` is a node's, where it has others than most of its kind.
    Raises ConfigError: a config that cannot be read, a model whose shape is unknown, a GPU that is not in the table,
    a length below 0.
    """
    if gpu not in DEVICES:
        raise ConfigError(f"--gpu {gpu} is not known here; known: {', '.join(DEVICES)}")
    if gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, not {gpus}")
    tree = read_tree(Path(path))
    for override in overrides:
        apply_override(tree, override)
    config = from_dict(Config, tree)
    if not config.model.path:
        raise ConfigError("model.path is not set: give a model folder, or a path that ends in a known model's name")
    most = {"prompt": config.data.max_prompt_length, "response": config.rollout.max_response_length}
    for name, tokens in (("prompt", prompt_tokens), ("response", response_tokens)):
        if not 0 <= tokens <= most[name]:
            raise ConfigError(f"--{name}-tokens must be above 0 and at most {most[name]}, the longest, not {tokens:g}")
    device = dataclasses.replace(DEVICES[gpu], per_node=gpus_per_node or DEVICES[gpu].per_node)
    machine, workload = Machine(device, gpus), Workload.of(config)
    standard = times.default_lengths(config)
    lengths = Lengths(prompt_tokens or standard.prompt, response_tokens or standard.response)
    found = problems(config, workload, machine)
    if found:
        fix = find_fix(config, workload, machine)
        options = suggestions(config, workload, machine, lengths, SUGGESTIONS)
        return Plan(config, workload, machine, lengths, found, fix, options)
    return Plan(
        config,
        workload,
        machine,
        lengths,
        [],
        None,
        suggestions(config, workload, machine, lengths, SUGGESTIONS),
        memory.fullest(memory.predict(config, workload, machine.device)),
        tuple(times.phases(config, workload, machine.device, lengths)),
    )
