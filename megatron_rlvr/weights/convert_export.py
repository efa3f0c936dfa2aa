"""Megatron folder, of any layout, -> a Hugging Face folder that transformers and vLLM load; on a CPU, file by file."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import rule
from megatron_rlvr.weights.megatron_folder import FORMAT, METADATA, is_megatron_folder, model_folder
from megatron_rlvr.weights.partial_folder import PartialFolder, fingerprint
from megatron_rlvr.weights.sources import INDEX, SINGLE, VALUE_HEAD, MegatronWeights, Source

SHARD_BYTES = 2 << 30


@torch.no_grad()
def export_megatron(
    megatron: str | Path, hf: str | Path, model: str = "policy", advance: Callable[[int, int], None] | None = None
) -> None:
    """Write ``hf`` from ``megatron``, or from the ``model`` of a training checkpoint.

    ``advance(bytes done, of how many)`` is told after every file. Peak memory is one file of SHARD_BYTES and twice the
    largest tensor. An interrupted export goes on where it stopped. Raises ConfigError, with file and tensor, for a
    folder that is damaged or of another model; the target then does not exist. A critic's head goes into a file of its
    own, value_head.safetensors.
    """
    folder = _folder(Path(megatron), model)
    architecture = Architecture.from_folder(folder, key="--megatron")
    with MegatronWeights(folder, architecture) as source:
        names, head = list(source.check_model(architecture)), source.value_head()
        rule(bool(head) or model != "critic", f"--megatron={str(megatron)!r} is a language model: drop --model=critic")
        layouts = {name: source.layout(name) for name in names}
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in layouts.items()}
        stored = sorted({info.relative_path for info in source.megatron.metadata.storage_data.values()})
        task = {"export": str(folder.resolve()), "from": fingerprint(folder, [METADATA, "config.json", *stored])}
        partial, done = PartialFolder(hf, task), 0
        shards = _shards(sizes)
        for file, held in shards.items():
            if not partial.has(file):
                partial.write(file, functools.partial(_write, source, held))
            done += sum(sizes[name] for name in held)
            if advance:
                advance(done, sum(sizes.values()))
        if head:
            partial.write(VALUE_HEAD, lambda path: save_file(head, path))
    if len(shards) > 1:
        located = {name: file for file, held in shards.items() for name in held}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": located}
        partial.write(INDEX, lambda path: path.write_text(json.dumps(index, indent=2)))
    dtypes = {str(dtype).removeprefix("torch.") for _, dtype in layouts.values()}
    partial.copy_companions(folder, "bfloat16" if "bfloat16" in dtypes else min(dtypes), leave_out=(FORMAT,))
    partial.finish()


def _folder(path: Path, model: str) -> Path:
    """The Megatron folder that is meant. Raises ConfigError, which names what there is."""
    folder, given = model_folder(path, model), f"--megatron={str(path)!r}"
    held = sorted(inside.parent.name for inside in path.glob(f"*/{METADATA}"))
    rule(
        is_megatron_folder(folder) or not held,
        f"{given} is a checkpoint without {model}: it holds {' and '.join(held)}, which --model names",
    )
    rule(is_megatron_folder(folder), f"{given} is no Megatron folder: it holds no {METADATA}")
    return folder


def _shards(sizes: dict[str, int]) -> dict[str, list[str]]:
    """Safetensors file -> the tensors in it, up to SHARD_BYTES."""
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if groups[-1] and sum(sizes[held] for held in groups[-1]) + size > SHARD_BYTES:
            groups.append([])
        groups[-1].append(name)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{number:05}-of-{count:05}.safetensors": held for number, held in enumerate(groups, 1)}


def _write(source: Source, names: list[str], path: Path) -> None:
    save_file({name: _alone(source.tensor(name)) for name in names}, path, metadata={"format": "pt"})


def _alone(tensor: Tensor) -> Tensor:
    """Gate and up are views of one tensor, and safetensors wants each on its own."""
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
