"""The policy's shards -> whole tensors under their Hugging Face names, one bucket at a time, on every rank.

The same walk feeds the rollout engine after each update and writes the final checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.distributed.collect import all_gather_flat, broadcast_tensor
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.weights import mapping
from megatron_rlvr.weights.mapping import Entry

BUCKET_BYTES = 256 << 20


def global_parameters(chunks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """This rank's parameters by name, layers numbered over the whole model instead of within a chunk."""
    named: dict[str, nn.Parameter] = {}
    for chunk in chunks:
        # Megatron counts layers over all stages from 1.
        layers: Any = chunk.get_submodule("decoder.layers")
        numbers = {str(index): layer.layer_number - 1 for index, layer in enumerate(layers)}
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, local, rest = name.split(".", 3)
                name = f"decoder.layers.{numbers[local]}.{rest}"
            named[name] = parameter
    return named


def owner_stage(entry: Entry, architecture: Architecture, pp_size: int, num_chunks: int) -> int:
    """The pipeline stage that holds an entry; chunk c of stage p is the model's (c * pp_size + p)-th run of layers."""
    if entry.layer is not None:
        return entry.layer // (architecture.num_layers // (pp_size * num_chunks)) % pp_size
    return 0 if entry.megatron[0].startswith("embedding.") else pp_size - 1


@torch.no_grad()
def hf_weights(
    chunks: Sequence[nn.Module], architecture: Architecture, groups: ParallelGroups, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor), the same on every rank and in the same order; collective.

    One bucket is in memory at a time: ``bucket_bytes``, or the largest tensor where that is more. It costs one
    tensor-parallel all-gather on the owner stage and one broadcast over the stages. Every rank must consume all of it.
    """
    own = global_parameters(chunks)
    dtype = next(iter(own.values())).dtype
    for owner, bucket in _buckets(architecture, groups, len(chunks), bucket_bytes // dtype.itemsize):
        gathered = _gather_bucket(bucket, owner, own, architecture, groups)
        offset = 0
        for entry in bucket:
            shape = mapping.shard_shape(entry, architecture, groups.tp_size)
            stop = offset + math.prod(shape)
            shards = [flat[offset:stop].view(shape) for flat in gathered]
            yield from zip(entry.hf, mapping.to_hf(entry, shards, architecture), strict=True)
            offset = stop


def _buckets(
    architecture: Architecture, groups: ParallelGroups, num_chunks: int, limit: int
) -> Iterator[tuple[int, list[Entry]]]:
    """(owner stage, entries): runs of entries of one stage that hold at most ``limit`` elements over all shards."""
    bucket: list[Entry] = []
    current, held = 0, 0
    for entry in mapping.entries(architecture):
        owner = owner_stage(entry, architecture, groups.pp_size, num_chunks)
        size = math.prod(mapping.shard_shape(entry, architecture, groups.tp_size)) * groups.tp_size
        if bucket and (owner != current or held + size > limit):
            yield current, bucket
            bucket, held = [], 0
        bucket.append(entry)
        current, held = owner, held + size
    if bucket:
        yield current, bucket


def _gather_bucket(
    bucket: list[Entry],
    owner: int,
    own: dict[str, nn.Parameter],
    architecture: Architecture,
    groups: ParallelGroups,
) -> Tensor:
    """[tp_size, n]: each tensor-parallel rank's parameters of the bucket, end to end; the same on every stage."""
    if groups.pp_rank == owner:
        flat = torch.cat([_parameter(entry, own).detach().reshape(-1) for entry in bucket])
        gathered = all_gather_flat(flat, groups.tp)
    else:
        size = sum(math.prod(mapping.shard_shape(entry, architecture, groups.tp_size)) for entry in bucket)
        like = next(iter(own.values()))
        gathered = torch.empty(groups.tp_size, size, dtype=like.dtype, device=like.device)
    broadcast_tensor(gathered, owner, groups.pp)
    return gathered


def _parameter(entry: Entry, own: dict[str, nn.Parameter]) -> nn.Parameter:
    for name in entry.megatron:
        if name in own:
            return own[name]
    raise mapping.UnknownParameterError(f"this stage should hold {entry.megatron[0]}, but has no such parameter")
