"""The policy's shards -> whole tensors under their Hugging Face names, one bucket at a time, on every rank.

The same walk feeds the rollout engine after each update and writes the final checkpoint.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    for bucket in _buckets(architecture, groups.tp_size, groups.pp_size, len(chunks), bucket_bytes // dtype.itemsize):
        gathered = _gather_bucket(bucket, own, groups)
        offset = 0
        for entry, shape in bucket.shards:
            stop = offset + math.prod(shape)
            shards = gathered[:, offset:stop].view(-1, *shape)
            yield from zip(entry.hf, mapping.to_hf(entry, shards, architecture), strict=True)
            offset = stop
        del gathered, shards  # before the next bucket is made


@dataclass(frozen=True)
class _Bucket:
    """What travels together: entries of one pipeline stage, and the shape of one tensor-parallel rank's part of each.

    _Bucket(owner=1, shards=((final norm, (64,)), (output layer, (512, 64))))
    """

    owner: int
    shards: tuple[tuple[Entry, tuple[int, ...]], ...]

    @property
    def size(self) -> int:
        """Elements of one tensor-parallel rank's part."""
        return sum(math.prod(shape) for _, shape in self.shards)


@functools.lru_cache(maxsize=8)
def _buckets(
    architecture: Architecture, tp_size: int, pp_size: int, num_chunks: int, limit: int
) -> tuple[_Bucket, ...]:
    """Runs of entries of one stage that hold at most ``limit`` elements over all shards, or a single larger entry."""
    buckets: list[_Bucket] = []
    for entry in mapping.entries(architecture):
        owner = owner_stage(entry, architecture, pp_size, num_chunks)
        part = _Bucket(owner, ((entry, mapping.shard_shape(entry, architecture, tp_size)),))
        last = buckets[-1] if buckets else None
        if last and last.owner == owner and (last.size + part.size) * tp_size <= limit:
            buckets[-1] = _Bucket(owner, last.shards + part.shards)
        else:
            buckets.append(part)
    return tuple(buckets)


def _gather_bucket(bucket: _Bucket, own: dict[str, nn.Parameter], groups: ParallelGroups) -> Tensor:
    """[tp_size, n]: each tensor-parallel rank's parameters of the bucket, end to end; the same on every stage."""
    if groups.pp_rank == bucket.owner:
        flat = torch.cat([_parameter(entry, own).detach().reshape(-1) for entry, _ in bucket.shards])
        gathered = all_gather_flat(flat, groups.tp)
    else:
        like = next(iter(own.values()))
        gathered = torch.empty(groups.tp_size, bucket.size, dtype=like.dtype, device=like.device)
    broadcast_tensor(gathered, bucket.owner, groups.pp)
    return gathered


def _parameter(entry: Entry, own: dict[str, nn.Parameter]) -> nn.Parameter:
    for name in entry.megatron:
        if name in own:
            return own[name]
    raise mapping.UnknownParameterError(f"this stage should hold {entry.megatron[0]}, but has no such parameter")
