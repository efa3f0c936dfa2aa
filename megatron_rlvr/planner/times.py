"""FLOPs and seconds of a step by phase: the floor at the hardware's peak, and what is expected at a share of it.

Everything here is predicted. The floor assumes perfect overlap, balance and kernels, and is never reached.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config
from megatron_rlvr.planner.devices import Device
from megatron_rlvr.planner.memory import engine_weights, kv_bytes_per_token, kv_cache
from megatron_rlvr.planner.workload import Workload, forward_flops, whole_parameters

# Shares of the peak that are expected. With the communication below, which does not overlap, training on H100 comes to
# an MFU of 0.35 at tp 2 and 0.27 at tp 8: published are 0.40 to 0.31 (verl, docs/perf/dpsk.md), 0.36 (prime-rl).
COMPUTE_SHARE, BANDWIDTH_SHARE = 0.4, 0.5
DECODE_LATENCY = 15e-6  # seconds of one small all-reduce within a node; a judgement


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of a response, which decide what a step costs and which no config knows."""

    prompt: float
    response: float

    @property
    def whole(self) -> float:
        return self.prompt + self.response


@dataclass(frozen=True)
class PhaseTime:
    """PhaseTime("update", flops=1e18, floor=12.0, expected=34.0, why="..."): FLOPs of all ranks, seconds of a step."""

    name: str
    flops: float
    floor: float
    expected: float
    why: str


def default_lengths(config: Config) -> Lengths:
    return Lengths(config.data.max_prompt_length / 8, config.rollout.max_response_length / 2)


def bubble(config: Config) -> float:
    """Share of a pass in which a pipeline stage waits: (p - 1) / (v m + p - 1) (arXiv 2104.04473 Sec 2.2)."""
    pp, vpp = config.parallel.pp, config.parallel.vpp
    return (pp - 1) / (vpp * config.most_microbatches + pp - 1)


def phases(config: Config, workload: Workload, device: Device, lengths: Lengths) -> list[PhaseTime]:
    """In the order of the step; without verifiers, which run beside generation."""
    responses = config.responses_per_step
    tokens = responses * lengths.whole

    def one_pass(name: str, model: Architecture, forwards: int, why: str, output: bool = True) -> PhaseTime:
        flops = forwards * forward_flops(model, tokens, lengths.whole / 2, output)
        moved = _moved(config, model, device, tokens, forwards, output)
        busy = 1 - bubble(config)
        compute = flops / (config.world_size * device.flops)
        return PhaseTime(
            name,
            flops,
            max(compute, moved) / busy,
            (compute / COMPUTE_SHARE + moved / BANDWIDTH_SHARE) / busy,
            why + (f", bubble {1 - busy:.0%}" if busy < 1 else ""),
        )

    found = [generation(config, workload, device, lengths)]
    if workload.reference:
        found.append(one_pass("reference", workload.policy, 1, "one forward"))
    if workload.states_pass:
        found.append(one_pass("states", workload.policy, 1, "one forward without logits", output=False))
    if workload.old_policy_pass:
        found.append(one_pass("log_probs", workload.policy, 1, "one forward of the old policy"))
    times = 4 if config.model.recompute == "full" else 3
    why = f"forward and backward = {times} forwards" + " with recomputation" * (times == 4)
    if workload.critic:
        found.append(one_pass("values", workload.critic, 1, "one forward of the critic", output=False))
        found.append(one_pass("critic update", workload.critic, times, why, output=False))
    found.append(one_pass("update", workload.policy, times, why))
    return [*found, weight_sync(config, workload, device)]


def _moved(config: Config, model: Architecture, device: Device, tokens: float, forwards: int, output: bool) -> float:
    """Seconds in which a rank moves bytes: activations between tensor-parallel ranks, gradients between replicas.

    Two all-reduces a layer in a forward and two in a backward (arXiv 1909.08053 Sec 3); sequence parallelism splits
    them into gathers and scatters of the same volume, and gathers two inputs again in the backward (arXiv 2205.05198
    Sec 4.2). A ring moves 2 (n - 1) / n of the buffer. Context parallelism exchanges queries, keys, values and outputs
    once a layer in a forward and in a backward (arXiv 2309.14509 Sec 3), of which (n - 1) / n leave the rank. An update
    reduces fp32 gradients once and gathers weights once. Stages send so little that it is left out.
    """
    reduces = 2 if forwards == 1 else 2 * (forwards - 2) + (3 if config.parallel.sequence_parallel else 2)
    parallel, size = config.parallel, config.model.itemsize
    tp, cp, pp, replicas = parallel.tp, parallel.cp, parallel.pp, parallel.dp * parallel.cp
    token_layers = model.num_layers / pp * tokens / replicas
    reduced = reduces * 2 * (tp - 1) / tp * token_layers * model.hidden_size * size
    seconds = reduced / (device.link if tp <= device.per_node else device.network)
    widths = 2 * (model.query_size + max(model.kv_size, cp * tp * model.head_dim))  # a rank has at least one kv head
    exchanged = max(1, forwards - 1) * (cp - 1) / cp * token_layers * widths / tp * size
    seconds += exchanged / (device.link if tp * cp <= device.per_node else device.network)
    if forwards > 1:
        held = whole_parameters(model, output) / (tp * pp)
        near = device.link if tp * replicas <= device.per_node else device.network
        seconds += config.trainer.updates_per_rollout * (4 + size) * held * (replicas - 1) / replicas / near
    return seconds


def generation(config: Config, workload: Workload, device: Device, lengths: Lengths) -> PhaseTime:
    """Decoding reads the weights once per step of all running sequences, and each sequence's keys and values.

    With the sequences that run together always as many, a replica makes responses / running x mean length such steps.
    """
    tp = config.rollout_tp
    replicas = config.world_size // tp
    responses = config.responses_per_step
    share = -(-responses // replicas)
    running = min(share, running_sequences(config, workload, device, lengths))
    context = lengths.prompt + lengths.response / 2
    read = engine_weights(config, workload) + running * context * kv_bytes_per_token(config, workload)
    flops = forward_flops(workload.policy, 1, context)
    step_floor = max(read / device.memory_bandwidth, running * flops / (tp * device.flops))
    step_expected = read / (BANDWIDTH_SHARE * device.memory_bandwidth)
    step_expected += running * flops / (COMPUTE_SHARE * tp * device.flops)
    step_expected += 2 * workload.policy.num_layers * DECODE_LATENCY * (tp > 1)
    steps = share / running * lengths.response
    prefill = share * lengths.prompt * flops / (tp * device.flops)
    return PhaseTime(
        "generation",
        responses * lengths.whole * flops,
        steps * step_floor + prefill,
        steps * step_expected + prefill / COMPUTE_SHARE,
        f"{replicas} replica(s), {running:,.0f} of {share:,} sequences at a time, {read / 1e9:.1f} GB read per token",
    )


def running_sequences(config: Config, workload: Workload, device: Device, lengths: Lengths) -> int:
    """That an engine replica decodes together: as many as rollout.max_running and the KV cache allow."""
    fit = kv_cache(config, workload, device) // kv_bytes_per_token(config, workload) / lengths.whole
    return max(1, min(config.rollout.max_running, int(fit)))


def sync_bytes(config: Config, workload: Workload) -> int:
    """Bytes of the whole model that every rank gathers and hands to its engine (weights/gather.py)."""
    return whole_parameters(workload.policy) * config.model.itemsize


def weight_sync(config: Config, workload: Workload, device: Device) -> PhaseTime:
    """A rank receives what it does not hold: from tensor-parallel neighbours, then from the other stages.

    Ranks are numbered tensor-parallel first, then replicas, then stages: stages share a node only where all ranks do.
    Each byte is then written once by the gather, and read and written by the engine.
    """
    size, tp, pp = sync_bytes(config, workload), config.parallel.tp, config.parallel.pp
    from_neighbours = size / pp * (tp - 1) / tp
    from_stages = size * (pp - 1) / pp
    near = device.link if config.world_size <= device.per_node else device.network
    moved = from_neighbours / (device.link if tp <= device.per_node else device.network) + from_stages / near
    copied = (size + 2 * size / config.rollout_tp) / device.memory_bandwidth
    return PhaseTime(
        "weight_sync",
        0.0,
        moved + copied,
        (moved + copied) / BANDWIDTH_SHARE,
        f"{size / 1e9:.1f} GB to every rank, of which {(from_neighbours + from_stages) / 1e9:.1f} GB over links",
    )
