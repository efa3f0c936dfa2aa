"""Memory of the fullest rank, item by item, each with the formula it comes from; everything here is predicted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config, OptimizerConfig
from megatron_rlvr.planner.activations import (
    in_flight,
    layer_bytes,
    norm_bytes,
    recomputed_bytes,
    sequence_cut,
)
from megatron_rlvr.planner.devices import GIB, Device
from megatron_rlvr.planner.workload import Workload, stage_parameters, whole_parameters

MIB = 2**20
LOGITS_BLOCK = {True: 1 << 24, False: 1 << 26}  # platform.logits_block_elements, on a CPU and on a GPU
LEAST_ROWS, PRODUCT_ROWS = 64, 2048  # distributed/vocab_linear.py
TOKENS_AT_A_TIME = 8192  # rollout/vllm_settings.py
CUDA_GRAPHS = GIB // 2  # of the engine; an estimate
FRAGMENTATION = 0.03  # of the device, which the caching allocator's rounding may cost a training pass; a judgement


@dataclass(frozen=True)
class Item:
    """One line of the table. Item("gradients", 4000, "4 B x 1,000 parameters, fp32 buffer")."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Memory:
    """Of one rank: what it always holds, and what training and generation add to that."""

    stage: int
    process: tuple[Item, ...]  # imports, device context, communicators
    state: tuple[Item, ...]
    training: tuple[Item, ...]
    generation: tuple[Item, ...]
    engine_stays: bool  # a CPU's engine does not give its memory back while the policy trains

    @property
    def training_peak(self) -> int:
        held = self.generation if self.engine_stays else ()
        return _sum(self.process, self.state, self.training, held)

    @property
    def generation_peak(self) -> int:
        return _sum(self.process, self.state, self.generation)


def _sum(*groups: tuple[Item, ...]) -> int:
    return sum(item.bytes for group in groups for item in group)


def predict(config: Config, workload: Workload, device: Device) -> list[Memory]:
    """A rank of each pipeline stage: the first has the most activations in flight, the last may have the most state."""
    return [
        Memory(
            stage,
            process_items(config, device),
            state_items(config, workload, stage),
            training_items(config, workload, device, stage),
            engine_items(config, workload, device),
            device.is_cpu,
        )
        for stage in range(config.parallel.pp)
    ]


def fullest(stages: list[Memory]) -> Memory:
    return max(stages, key=lambda memory: max(memory.training_peak, memory.generation_peak))


def process_items(config: Config, device: Device) -> tuple[Item, ...]:
    parallel = config.parallel
    if device.is_cpu:
        return (Item("imports", 860 * MIB, "measured: torch, Megatron and vLLM resident in a rank before it builds"),)
    communicators = 3 + 2 * (parallel.tp > 1) + (parallel.dp > 1) + 2 * (parallel.cp > 1) + 3 * (parallel.pp > 1)
    return (
        Item("CUDA context", GIB // 2, "estimate: context, kernels and library workspaces"),
        Item(
            "NCCL",
            communicators * 128 * MIB,
            f"estimate: {communicators} communicators x 16 channels x 2 buffers of NCCL_BUFFSIZE = 4 MiB",
        ),
    )


def state_items(config: Config, workload: Workload, stage: int) -> tuple[Item, ...]:
    """Weights, gradients and optimizer of policy and critic, and the frozen reference's weights."""
    parallel, size = config.parallel, config.model.itemsize
    policy = stage_parameters(workload.policy, parallel.tp, parallel.pp, stage)
    items = _trained("policy", policy, size, config.optimizer, parallel.dp * parallel.cp)
    if workload.critic:
        critic = stage_parameters(workload.critic, parallel.tp, parallel.pp, stage, config.critic.num_heads)
        items += _trained("critic", critic, size, config.critic.optimizer, parallel.dp * parallel.cp)
    if workload.reference:
        items.append(Item("reference weights", size * policy, f"{size} B x {policy:,}"))
    return tuple(items)


def _trained(name: str, total: int, size: int, optimizer: OptimizerConfig, ranks: int) -> list[Item]:
    """Megatron-core's distributed optimizer guide: 6 + 12/d bytes a parameter in bf16, 8 + 8/d in fp32, for d ranks."""
    shards = ranks if optimizer.distributed else 1
    per_parameter = 8 + (4 if size == 2 else 0)  # AdamW's two moments, and fp32 weights beside bf16 ones
    return [
        Item(f"{name} weights", size * total, f"{size} B x {total:,} parameters of this rank"),
        Item(f"{name} gradients", 4 * total, f"4 B x {total:,}, summed in fp32"),
        Item(
            f"{name} optimizer",
            per_parameter * -(-total // shards),
            f"{per_parameter} B x {total:,}" + (f" / {shards} ranks of dp and cp" if shards > 1 else ""),
        ),
    ]


def training_items(config: Config, workload: Workload, device: Device, stage: int) -> tuple[Item, ...]:
    """What the heaviest moment of an update adds: the first backward, or on gloo the sum of gradients over replicas."""
    batch = _batch_item(config, workload)
    moments = [_backward(config, workload.policy, device, stage, heads=0)]
    if workload.critic:
        moments.append(_backward(config, workload.critic, device, stage, config.critic.num_heads))
    if device.is_cpu and config.optimizer.distributed:
        total = stage_parameters(workload.policy, config.parallel.tp, config.parallel.pp, stage)
        why = f"4 B x {total:,}: gloo reduces a copy of the buffer, when the activations are gone"
        moments.append((Item("gradient reduction", 4 * total, why),))
    beside = [] if device.is_cpu else [Item("CUDA graphs", CUDA_GRAPHS, "estimate: kept while the engine sleeps")]
    if device.is_cpu and config.trainer.save_every:
        copied = checkpoint_copy(config, workload, stage)
        beside.append(Item("checkpoint", copied, "weights and optimizer state, copied while the run goes on"))
    return (batch, *beside, *max(moments, key=_sum))


def _batch_item(config: Config, workload: Workload) -> Item:
    """The step's tokens of this data-parallel rank: 13 columns of ids, masks, log-probs and advantages."""
    tokens = config.responses_per_step * config.longest // config.parallel.dp
    width = 76 + 12 * workload.old_top
    why = f"<= {tokens:,} tokens x {width} B" + (f", {workload.old_top} of the proxy's each" * bool(workload.old_top))
    return Item("batch", tokens * width, why)


def _backward(config: Config, architecture: Architecture, device: Device, stage: int, heads: int) -> tuple[Item, ...]:
    """Activations of what is in flight, and the larger of what the head's and a layer's backward add."""
    tokens, local = microbatch(config), device.is_cpu
    held, cut = in_flight(config, config.most_microbatches, stage)
    layers = held * architecture.num_layers // cut
    full = layer_bytes(config, architecture, tokens, device)
    if config.model.recompute == "full":
        kept = layers * recomputed_bytes(config, architecture, tokens) + full
        why = f"{layers} layer inputs and one whole layer"
    else:
        each = layer_bytes(config, architecture, tokens, device, config.model.recompute == "selective")
        kept, why = layers * each + (full - each), f"{layers} layers x {each / MIB:.0f} MiB"
    is_last = stage == config.parallel.pp - 1
    if is_last:
        kept += tokens * norm_bytes(config, architecture, local)
    gradients = max(
        _layer_gradients(config, architecture, tokens),
        head_bytes(config, architecture, device) if is_last and not heads else 0,
    )
    name = "activations" if not heads else "critic activations"
    what = f"{'logits ' + architecture.logits_form(config) if is_last and not heads else 'gradients of a layer'}"
    return (
        Item(name, kept, f"{why}, {held} in flight x {tokens:,} tokens, recompute {config.model.recompute}"),
        Item("statistics and gradients in passing", gradients, f"{what}; the larger of head and layer"),
    )


def _layer_gradients(config: Config, architecture: Architecture, tokens: int) -> int:
    """Gradients alive at once in the gated MLP's backward, and its weight's: apex alone adds into the buffer."""
    tp, size = config.parallel.tp, config.model.itemsize
    columns = architecture.ffn_size // tp
    passing = tokens * (2 * columns + 2 * architecture.hidden_size) * size
    return passing + 2 * columns * architecture.hidden_size * size


def head_bytes(config: Config, architecture: Architecture, device: Device) -> int:
    """The statistics' buffers: all logits of a microbatch, whose gradient takes their place, or a block of them."""
    tp, size, tokens, h = config.parallel.tp, config.model.itemsize, microbatch(config), architecture.hidden_size
    columns = architecture.padded_vocab(tp) // tp
    hidden_gradient = tokens * h * size * (2 if sequence_cut(config) > 1 else 1)  # and the gathered hidden states
    if (form := architecture.logits_form(config)) != "materialised":
        block, width = LOGITS_BLOCK[device.is_cpu], 4 if form == "fused_float32" else size
        forward = min(tokens, max(LEAST_ROWS, block // columns)) * columns * width
        height = min(tokens, max(math.isqrt(block), block // columns))  # of a tile, whose hidden gradient is fp32
        products = 2 * PRODUCT_ROWS * h * size if size == 2 and device.is_cpu else 0  # a GPU adds as it multiplies
        copied = size if width > size else 0  # a tile's gradient, for the products with it
        backward = height * min(columns, block // height) * (width + copied) + height * h * 4 + products
        return max(forward, backward) + hidden_gradient
    return tokens * columns * size + hidden_gradient + columns * h * size  # the last: its weight's gradient


def engine_items(config: Config, workload: Workload, device: Device) -> tuple[Item, ...]:
    """vLLM's part: on a CPU its weights and its cache; on a GPU the share of the device that it is given.

    Its weights come while its cache is away, so that only a very small share is less than what a sync takes.
    """
    weights = engine_weights(config, workload)
    if device.is_cpu:
        return (
            Item("engine weights", weights, f"{config.model.itemsize} B x parameters / rollout.tp {config.rollout_tp}"),
            Item("engine KV cache", config.rollout.kv_cache_mib * MIB, "rollout.kv_cache_mib"),
        )
    share = config.rollout.gpu_memory_utilization
    largest = workload.policy.vocab_size * workload.policy.hidden_size * config.model.itemsize
    passing = largest + largest // config.parallel.tp + largest // config.rollout_tp
    why = f"rollout.gpu_memory_utilization {share} x {device.name}"
    generation = (Item("engine", int(share * device.memory), why),)
    sync = (
        Item("engine weights", weights, f"{config.model.itemsize} B x parameters / rollout.tp {config.rollout_tp}"),
        Item("weight sync", passing, "the largest tensor whole, the own part of it and the engine's new one"),
    )
    return max(generation, sync, key=_sum)


def engine_weights(config: Config, workload: Workload) -> int:
    return whole_parameters(workload.policy) * config.model.itemsize // config.rollout_tp


def kv_cache(config: Config, workload: Workload, device: Device) -> int:
    """Bytes left for keys and values: the engine's share without weights and the buffers of its profiling run.

    Those are, for TOKENS_AT_A_TIME, hidden states and the MLP, fp32 logits of the running sequences with their sorted
    copy, and CUDA graphs.
    """
    if device.is_cpu:
        return config.rollout.kv_cache_mib * MIB
    model, tp = workload.policy, config.rollout_tp
    passing = TOKENS_AT_A_TIME * (2 * model.ffn_size // tp + 4 * model.hidden_size) * config.model.itemsize
    passing += config.rollout.max_running * model.vocab_size * 8 + CUDA_GRAPHS
    share = int(config.rollout.gpu_memory_utilization * device.memory)
    return share - engine_weights(config, workload) - passing


def host_memory(config: Config, workload: Workload, device: Device, ranks: int) -> tuple[Item, ...]:
    """What ``ranks`` ranks of a node take of its memory beside their processes, at most; a CPU has no other memory."""
    if device.is_cpu:
        return ()
    engine = engine_weights(config, workload)
    copies = max(checkpoint_copy(config, workload, stage) for stage in range(config.parallel.pp))
    return (
        Item(
            "sleeping engines' weights",
            2 * engine * ranks,
            f"at most 2 x {ranks} ranks x {engine / GIB:.2f} GiB, pinned: each matrix is rounded up to a power of two",
        ),
        Item("a checkpoint being written", copies * ranks, f"{ranks} ranks x their weights and optimizer state"),
    )


def checkpoint_copy(config: Config, workload: Workload, stage: int) -> int:
    """Bytes that a rank copies before it writes them while the run goes on (models/checkpoint_writer.py), at most."""
    copied = ("policy weights", "policy optimizer", "critic weights", "critic optimizer")
    return sum(item.bytes for item in state_items(config, workload, stage) if item.name in copied)


def kv_bytes_per_token(config: Config, workload: Workload) -> int:
    """Keys and values of every layer on one engine rank."""
    return workload.policy.kv_size_per_token(config.rollout_tp) * config.model.itemsize


def microbatch(config: Config) -> int:
    """Tokens of the fullest microbatch, or of a rank's stretch of it under context parallelism."""
    tokens = min(config.trainer.microbatch_tokens, config.responses_per_rank * config.longest)
    return -(-tokens // config.parallel.cp)
