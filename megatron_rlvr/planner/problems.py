"""What makes a layout impossible: the run's own rules, the model's divisors, memory. Empty: it can run."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlvr.config import Config, ConfigError, check
from megatron_rlvr.planner import memory
from megatron_rlvr.planner.devices import GIB, Device
from megatron_rlvr.planner.workload import Workload


@dataclass(frozen=True)
class Machine:
    """``gpus`` devices of one kind."""

    device: Device
    gpus: int

    @property
    def memory(self) -> int:
        """Of one rank; the ranks of a CPU share what there is."""
        return self.device.memory // self.gpus if self.device.is_cpu else self.device.memory


def problems(config: Config, workload: Workload, machine: Machine) -> list[str]:
    """One sentence each: what is wrong, and the rule. Memory is only looked at where the layout is possible."""
    return _layout(config, workload, machine) or _memory(config, workload, machine)


def _layout(config: Config, workload: Workload, machine: Machine) -> list[str]:
    found = []
    if config.world_size != machine.gpus:
        parallel = config.parallel
        layout = " x ".join(f"parallel.{axis}={getattr(parallel, axis)}" for axis in ("tp", "cp", "pp", "dp"))
        found.append(f"{layout} = {config.world_size} ranks, but there are {machine.gpus} GPUs: every GPU is one rank")
    model, parallel = workload.policy, config.parallel
    try:
        check(config)
    except ConfigError as error:  # what follows divides by what it refuses
        return [*found, str(error)]
    checks = [
        lambda: model.check_layout(parallel.tp, parallel.pp, parallel.vpp, parallel.cp),
        lambda: model.check_engine_layout(config.rollout_tp),
        lambda: model.check_length(config.longest),
    ]
    if workload.critic:
        critic = workload.critic
        checks.append(lambda: critic.check_layout(parallel.tp, parallel.pp, parallel.vpp, parallel.cp))
    for run in checks:
        try:
            run()
        except ConfigError as error:
            found.append(str(error))
    return found


def _memory(config: Config, workload: Workload, machine: Machine) -> list[str]:
    found, device = [], machine.device
    stages = memory.predict(config, workload, device)
    training = max(stages, key=lambda stage: stage.training_peak)
    generation_peak = max(stage.generation_peak for stage in stages)
    total = machine.memory / GIB
    usable = machine.memory * (1 - memory.FRAGMENTATION)
    if training.training_peak > usable:
        found.append(
            f"training is predicted to take {training.training_peak / GIB:.1f} GiB on a rank of pipeline stage "
            f"{training.stage}, of {total:.1f} GiB less {memory.FRAGMENTATION:.0%} for the allocator"
        )
    if generation_peak > machine.memory:
        found.append(
            f"generation is predicted to take {generation_peak / GIB:.1f} GiB of {total:.1f}: the engine's "
            f"share and what training keeps on the device (weights, gradients, optimizer) must fit together"
        )
    kv, needed = memory.kv_cache(config, workload, device), config.longest
    needed *= memory.kv_bytes_per_token(config, workload)
    if kv < needed:
        found.append(
            f"the engine's keys and values have {max(0, kv) / GIB:.2f} GiB, but one sequence of "
            f"{config.longest:,} tokens takes {needed / GIB:.2f}: vLLM refuses to start"
        )
    return found
