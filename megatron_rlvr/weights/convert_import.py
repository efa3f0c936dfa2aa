"""Hugging Face folder -> Megatron folder (weights/megatron_folder.py), on a CPU, one tensor in memory at a time.

Written as ``dist_checkpointing.save`` of an unsharded ``GPTModel`` would write it: whole tensors, one chunk for each
layer and expert, so that any tp x pp x ep takes its parts with ``dist_checkpointing.load``. What the layout given here
sets is how far the vocabulary is padded, and that no file holds layers of two pipeline stages.
"""

from __future__ import annotations

import functools
import json
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import rule
from megatron_rlvr.weights import mapping
from megatron_rlvr.weights.gather import owner_stage
from megatron_rlvr.weights.megatron_folder import COMMON, FORMAT, METADATA
from megatron_rlvr.weights.partial_folder import PartialFolder, fingerprint
from megatron_rlvr.weights.sources import VALUE_HEAD, Checkpoint, Source

FILE_BYTES = 1 << 30
EXTRA_STATE = "extra_state.distcp"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Item:
    """One chunk to write: its tensor's name and whole shape in the folder, and where in that shape it stands.

    Item("decoder.layers.mlp.linear_fc2.weight", (28, 1024, 3072), (3,), stage=0, nbytes=6291456, read=...)
    """

    name: str
    shape: tuple[int, ...]
    place: tuple[int, ...]
    stage: int
    nbytes: int
    read: Callable[[], Tensor]
    extra_state: str | None = None


@torch.no_grad()
def import_hf(
    hf: str | Path, megatron: str | Path, tp: int = 1, pp: int = 1, advance: Callable[[int, int], None] | None = None
) -> None:
    """Write ``megatron`` from ``hf``; ``advance(bytes done, of how many)`` is told after every file.

    Peak memory is twice the largest tensor. An interrupted import goes on where it stopped. Raises ConfigError, with
    file and tensor, for a model, a layout or a folder that does not fit; the target then does not exist.
    """
    hf = Path(hf)
    architecture = Architecture.from_folder(hf, key="--hf")
    for name, size in {"tp": tp, "pp": pp}.items():
        rule(size >= 1, f"--{name} must be at least 1, not {size}: it is a number of ranks")
    architecture.check_layout(tp, pp, 1, key="--")
    with Checkpoint(hf) as source:
        source.check_model(architecture)
        files = _files(_items(source, architecture, tp, pp))
        named = sorted({*source.files.values(), VALUE_HEAD, "config.json"})
        task = {"import": str(hf.resolve()), "tp": tp, "pp": pp, "from": fingerprint(hf, named)}
        partial = PartialFolder(megatron, task)
        total, done = sum(map(_size, files.values())), 0
        for name, items in files.items():
            if not partial.has(f"{name}.json"):
                records: list[dict[str, Any]] = []
                partial.write(name, functools.partial(_write_chunks, items, records))
                written = json.dumps(records)
                partial.write(f"{name}.json", functools.partial(Path.write_text, data=written))
            done += _size(items)
            if advance:
                advance(done, total)
    _complete(partial, files, hf)


def _items(source: Source, architecture: Architecture, tp: int, pp: int) -> Iterator[Item]:
    """Everything the Megatron folder holds, in the model's order."""
    head = source.value_head()
    stacked: dict[str, torch.dtype] = {}
    for entry in mapping.entries(architecture):
        if entry.stored == ("output_layer.weight",) and head:
            continue
        layouts = [source.layout(name) for name in entry.hf]
        dtypes = {dtype for _, dtype in layouts}
        rule(len(dtypes) == 1, f"{source.path(entry.hf[0])}: {' and '.join(entry.hf)} differ in dtype")
        (dtype,) = dtypes
        rule(
            dtype == stacked.setdefault(entry.stored[0], dtype),
            f"{source.path(entry.hf[0])}: {entry.hf[0]} is {dtype}, in an earlier layer {stacked[entry.stored[0]]}",
        )
        shape = mapping.stored_shape(entry, architecture, tp)
        yield Item(
            entry.stored[0],
            shape,
            entry.place,
            owner_stage(entry, architecture, pp, 1),
            math.prod(shape[len(entry.place) :]) * dtype.itemsize,
            functools.partial(_megatron_tensor, source, entry, architecture, tp),
            mapping.extra_state(entry, shape),
        )
    for leaf, tensor in head.items():
        name = f"output_layer.{leaf}"
        yield Item(name, tuple(tensor.shape), (), pp - 1, tensor.nbytes, functools.partial(torch.clone, tensor))


def _megatron_tensor(source: Source, entry: mapping.Entry, architecture: Architecture, tp: int) -> Tensor:
    tensors = [source.tensor(name) for name in entry.hf]
    if entry.kind == "vocab":
        return mapping.stored_vocab(tensors[0], architecture, tp)
    return mapping.to_megatron(entry, tensors, architecture, 0, 1)


def _files(items: Iterator[Item]) -> dict[str, list[Item]]:
    """File name -> what is in it: items of one pipeline stage, up to FILE_BYTES."""
    files: dict[str, list[Item]] = {}
    current: list[Item] = []
    for item in items:
        if not current or current[-1].stage != item.stage or _size(current) + item.nbytes > FILE_BYTES:
            current = []
            files[f"__{item.stage}_{len(files)}.distcp"] = current
        current.append(item)
    return files


def _size(items: list[Item]) -> int:
    return sum(item.nbytes for item in items)


def _write_chunks(items: list[Item], records: list[dict[str, Any]], path: Path) -> None:
    """One file of ``torch.save`` archives; ``records`` says what each holds and where it is."""
    with path.open("wb") as file:
        for item in items:
            part = item.read()
            chunk = part.view(*(1 for _ in item.place), *part.shape)
            # A tensor of a safetensors file is a view of all of it, and torch.save writes what a view is of.
            chunk = chunk.clone() if chunk.untyped_storage().nbytes() != chunk.nbytes else chunk
            start = file.tell()
            torch.save(chunk, file)
            records.append(
                {
                    "name": item.name,
                    "size": item.shape,
                    "offsets": [*item.place, *(0 for _ in part.shape)],
                    "chunk": list(chunk.shape),
                    "dtype": str(chunk.dtype).removeprefix("torch."),
                    "start": start,
                    "length": file.tell() - start,
                    "extra_state": item.extra_state,
                }
            )


def _complete(partial: PartialFolder, files: dict[str, list[Item]], hf: Path) -> None:
    """Metadata from the records, the companions, and the folder's name."""
    metadata = Metadata({}, storage_data={}, version="1.0.0")
    partial.write(EXTRA_STATE, lambda path: torch.save([None], path))
    empty = _StorageInfo(EXTRA_STATE, 0, (partial.path / EXTRA_STATE).stat().st_size)
    dtypes = set()
    for file in files:
        for record in json.loads((partial.path / f"{file}.json").read_text()):
            _describe(metadata, record, file)
            dtypes.add(record["dtype"])
            if record["extra_state"]:
                metadata.state_dict_metadata[record["extra_state"]] = BytesStorageMetadata()
                metadata.storage_data[MetadataIndex(record["extra_state"])] = empty
    partial.copy_companions(hf, "bfloat16" if "bfloat16" in dtypes else min(dtypes))
    partial.write(COMMON, lambda path: torch.save({}, path))
    partial.write(METADATA, lambda path: path.write_bytes(pickle.dumps(metadata)))
    partial.write(FORMAT, lambda path: path.write_text(json.dumps(_FORMAT)))
    for file in files:
        (partial.path / f"{file}.json").unlink()
    partial.finish()


def _describe(metadata: Metadata, record: dict[str, Any], file: str) -> None:
    name, properties = record["name"], TensorProperties(dtype=getattr(torch, record["dtype"]))
    known = metadata.state_dict_metadata.setdefault(
        name, TensorStorageMetadata(properties, torch.Size(record["size"]), [])
    )
    assert isinstance(known, TensorStorageMetadata)
    offsets = torch.Size(record["offsets"])
    known.chunks.append(ChunkStorageMetadata(offsets, torch.Size(record["chunk"])))
    metadata.storage_data[MetadataIndex(name, offsets)] = _StorageInfo(file, record["start"], record["length"])
