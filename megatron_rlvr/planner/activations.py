"""Bytes that a forward pass leaves for its backward, tensor by tensor: t tokens of one microbatch on one rank.

Counted from the layers themselves: the local ones (models/attention.py, megatron-core's local spec) with
saved-tensor hooks, Transformer Engine's from arXiv 2205.05198 Sec 4 with flash attention, gated MLP, grouped
queries and no dropout. Under sequence parallelism what lies outside attention and MLP is cut over tp.
"""

from __future__ import annotations

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config
from megatron_rlvr.planner.devices import Device

MOST_PADDING = 2**0.5  # places per token of models/attention.py's views


def layer_bytes(
    config: Config, architecture: Architecture, tokens: int, device: Device, selective: bool = False
) -> int:
    """One layer's; a CPU's is without Transformer Engine; ``selective``: its core attention is computed again."""
    tp, size, local = config.parallel.tp, config.model.itemsize, device.is_cpu
    outside = 2 * norm_bytes(config, architecture, local)
    if local:
        inside = (_local_attention(architecture, size, selective) + 5 * architecture.ffn_size * size) // tp
    elif config.parallel.cp > 1 or not device.packed_attention or config.model.dtype == "float32":
        inside = int(_engine_layer_attention(architecture, size, selective) + 3 * architecture.ffn_size * size) // tp
    else:
        # Queries, keys and values before and after norm and rotation, the output; flash attention keeps no more, so
        # that computing it again saves nothing. Both halves of the MLP's first product, and the second one's input.
        attention = 3 * architecture.query_size + 3 * architecture.kv_size
        inside = ((attention + 3 * architecture.ffn_size) * size + 4 * architecture.num_heads) // tp
    return tokens * (outside + inside)


def _local_attention(architecture: Architecture, size: int, selective: bool) -> int:
    """Per token: what the norms of queries and keys keep in fp32, the core's inputs and output, the output unpadded."""
    q, kv = architecture.query_size, architecture.kv_size
    kept = q * size  # the input of the output projection
    if architecture.qk_norm:
        kept += 4 * (q + kv)
        kept += (q + 2 * kv) * size if size == 4 else 4 * (q + kv)  # bf16 is normed from a copy in fp32
    if selective:
        return kept + (q + 2 * kv) * size
    # Keys and values are repeated for every query head.
    return kept + 4 * q * size + 4 * architecture.num_heads


def _engine_layer_attention(architecture: Architecture, size: int, selective: bool) -> float:
    """Per token where only the core is the local one (models/build.py): Transformer Engine's norms keep their input.

    Of the core the worst case is counted, in which the padding of its views is as much as it may be.
    """
    q, kv = architecture.query_size, architecture.kv_size
    kept = q * size + (q + kv) * size * architecture.qk_norm
    if selective:
        return kept + (q + 2 * kv) * size
    return kept + MOST_PADDING * (4 * q * size + 4 * architecture.num_heads)


def norm_bytes(config: Config, architecture: Architecture, local: bool) -> int:
    """Per token, of one norm of the hidden state: its input and output; the local one also keeps x / rms, in fp32."""
    size = config.model.itemsize
    kept = (4 + 4 + size) if local else 2 * size
    return architecture.hidden_size * kept // sequence_cut(config)


def recomputed_bytes(config: Config, architecture: Architecture, tokens: int) -> int:
    """What a layer keeps under full recomputation: its input."""
    return tokens * architecture.hidden_size * config.model.itemsize // sequence_cut(config)


def in_flight(config: Config, microbatches: int, stage: int) -> tuple[int, int]:
    """(microbatches, or with vpp chunks of them, whose activations a stage holds; layers of each, as a divisor).

    1F1B, and interleaved 1F1B: arXiv 2104.04473 Sec 2.2; the warm-up of megatron-core's schedules.py plus the one
    that is running.
    """
    pp, vpp = config.parallel.pp, config.parallel.vpp
    if vpp == 1:
        return min(pp - stage, microbatches), pp
    return min(vpp * microbatches, 2 * (pp - stage - 1) + (vpp - 1) * pp + 1), pp * vpp


def sequence_cut(config: Config) -> int:
    return config.parallel.tp if config.parallel.sequence_parallel else 1
