"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_rlvr.planner import memory, times
from megatron_rlvr.planner.devices import GIB
from megatron_rlvr.planner.fixes import Change
from megatron_rlvr.planner.memory import Item
from megatron_rlvr.planner.plan import Plan
from megatron_rlvr.planner.workload import whole_parameters


def as_text(plan: Plan) -> str:
    parts = [_head(plan)]
    parts += [_refusal(plan)] if not plan.fits else [_memory(plan), _times(plan)]
    parts.append(_suggestions(plan))
    return "\n\n".join(part for part in parts if part)


def as_overrides(change: Change) -> str:
    """What to put behind the command: parallel.tp=4 parallel.dp=16."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in change.items()
    )


def _head(plan: Plan) -> str:
    parallel, config = plan.config.parallel, plan.config
    return (
        f"{config.name} on {plan.machine.gpus} x {plan.machine.device.name}: "
        f"tp {parallel.tp} x cp {parallel.cp} x pp {parallel.pp} x dp {parallel.dp}, rollout tp {config.rollout_tp}; "
        f"every figure is predicted\n"
        f"model: {whole_parameters(plan.workload.policy) / 1e9:.2f} billion parameters, {plan.workload.source}\n"
        f"device: {plan.machine.device.source}"
    )


def _refusal(plan: Plan) -> str:
    lines = ["REFUSED", *(f"  - {problem}" for problem in plan.problems)]
    if plan.fix:
        lines.append(f"  fix: {as_overrides(plan.fix)}")
    elif not plan.suggestions:
        lines.append(
            "  fix: none found: change what is named above; where that is memory, more GPUs may help, or ones with more"
        )
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    found, total = plan.memory, plan.machine.memory / GIB
    assert found is not None
    lines = [f"predicted memory of the fullest rank (pipeline stage {found.stage}), of {total:.1f} GiB"]
    for title, items in (
        ("always", (*found.process, *found.state)),
        ("while training", found.training),
        ("while generating" if not found.engine_stays else "the engine, always", found.generation),
    ):
        lines += [f"  {title}", *_items(items)]
    lines.append(f"  peak: training {found.training_peak / GIB:.2f}, generation {found.generation_peak / GIB:.2f} GiB")
    cache = memory.kv_cache(plan.config, plan.workload, plan.machine.device)
    running = times.running_sequences(plan.config, plan.workload, plan.machine.device, plan.lengths)
    lines.append(f"  engine: {cache / GIB:.2f} GiB of keys and values, {running} sequences of mean length at a time")
    if plan.host_memory:
        most = sum(item.bytes for item in plan.host_memory) / GIB
        lines += [f"predicted host memory of a node, at most {most:.0f} GiB beside its processes"]
        lines += _items(plan.host_memory)
    return "\n".join(lines)


def _items(items: Iterable[Item]) -> list[str]:
    return [f"    {item.name:<36}{item.bytes / GIB:>9.2f} GiB  {item.why}" for item in items]


def _times(plan: Plan) -> str:
    lengths, config = plan.lengths, plan.config
    lines = [
        f"predicted step, for prompts of {lengths.prompt:,.0f} and responses of {lengths.response:,.0f} tokens (means)",
        f"  {'phase':<16}{'PFLOP':>10}{'floor s':>10}{'expected s':>12}",
    ]
    for phase in plan.phases:
        lines.append(
            f"  {phase.name:<16}{phase.flops / 1e15:>10,.1f}{phase.floor:>10,.2f}{phase.expected:>12,.2f}  {phase.why}"
        )
    floor, expected = plan.step_seconds
    lines.append(f"  {'step':<26}{floor:>10,.2f}{expected:>12,.2f}")
    lines.append(
        f"  floor: the hardware's peak; expected: {times.COMPUTE_SHARE:.0%} of its FLOPs, "
        f"{times.BANDWIDTH_SHARE:.0%} of its bandwidths"
    )
    lines.append(
        f"  pipeline bubble {times.bubble(config):.1%}, {config.most_microbatches} microbatches per update and rank"
    )
    lines.append(
        f"  whole run of {config.trainer.num_steps} steps: {plan.gpu_hours[1]:,.0f} GPU-hours expected "
        f"({plan.gpu_hours[0]:,.0f} at the floor), {plan.gpu_hours[1] / plan.machine.gpus:,.1f} hours; "
        f"without evaluation and start-up"
    )
    return "\n".join(lines)


def _suggestions(plan: Plan) -> str:
    if not plan.suggestions:
        return ""
    lines = ["layouts that fit, predicted, quickest first"]
    for item in plan.suggestions:
        lines.append(f"  {item.step_seconds:>9,.1f} s a step {item.peak / GIB:>7.1f} GiB  {as_overrides(item.change)}")
    return "\n".join(lines)
