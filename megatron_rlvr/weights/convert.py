"""Hugging Face folders in and out: safetensors -> Megatron parameters, and whole tensors -> a new folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import rule
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.weights import mapping
from megatron_rlvr.weights.gather import global_parameters
from megatron_rlvr.weights.partial_folder import readable, replacing, write_companions
from megatron_rlvr.weights.sources import INDEX, SINGLE, open_source

SHARD_BYTES = 4 << 30


@torch.no_grad()
def load_hf(
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    groups: ParallelGroups,
    path: str | Path,
    head: str = "",
) -> None:
    """Fill this rank's chunks from a Hugging Face or Megatron folder, a tensor in memory at a time, in their dtype.

    ``head`` names a critic's head: its parameters are filled from a critic's folder, and stay as they are with the
    folder of a language model, which holds none. Raises ConfigError, before anything is written, for a file that is
    absent or cut short and for a tensor that is missing, unknown or of another shape.
    """
    with open_source(path, architecture) as source:
        source.check_model(architecture)
        values = {f"{head}.{leaf}": tensor for leaf, tensor in source.value_head().items()}
        rule(bool(head) or not values, f"{path} holds a critic: a policy needs a language model")
        for name, parameter in global_parameters(chunks).items():
            if head and name.startswith(f"{head}."):
                if values:
                    _fill_head(parameter, values[name], name, path)
                continue
            entry = mapping.find(architecture, name)
            tensors = [source.tensor(part) for part in entry.hf]
            parameter.copy_(mapping.to_megatron(entry, tensors, architecture, groups.tp_rank, groups.tp_size))


def _fill_head(parameter: nn.Parameter, value: Tensor, name: str, path: str | Path) -> None:
    rule(
        parameter.shape == value.shape,
        f"{path}: {name} has shape {list(value.shape)}, critic.num_heads asks for {list(parameter.shape)}",
    )
    parameter.copy_(value)


def save_hf(
    weights: Iterator[tuple[str, Tensor]],
    companions: dict[str, bytes],
    destination: str | Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write (name, whole tensor) with a model's ``companions`` (partial_folder.py) as a folder for transformers.

    One process writes; at most ``shard_bytes`` of tensors are held at a time. The folder is written beside
    ``destination`` and renamed when complete, replacing an earlier one: a reader never sees half of it.
    """
    with replacing(Path(destination)) as partial:
        write_companions(companions, partial, _write_shards(weights, partial, shard_bytes))


def _write_shards(weights: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> str:
    """Safetensors files and, for more than one, their index. Returns the dtype's name ("bfloat16")."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0
    dtype = ""

    def flush() -> None:
        file = folder / f"{len(shards)}.safetensors"
        save_file(held, file, metadata={"format": "pt"})
        readable(file)
        shards.append(list(held))
        held.clear()

    for name, tensor in weights:
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        size, total = size + tensor.nbytes, total + tensor.nbytes
        dtype = str(tensor.dtype).removeprefix("torch.")
    flush()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / SINGLE)
        return dtype
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for number, file in enumerate(files):
        (folder / f"{number}.safetensors").rename(folder / file)
    located = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": located}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    return dtype
