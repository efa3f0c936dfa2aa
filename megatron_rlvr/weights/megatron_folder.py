"""A Megatron folder: megatron-core's ``torch_dist`` checkpoint beside a model's Hugging Face companions, read safely.

    FOLDER/.metadata      a pickle: the chunks that each tensor is cut into, and the file, offset and length of each
    FOLDER/*.distcp       the chunks, each a ``torch.save`` archive
    FOLDER/common.pt      what is no tensor
    FOLDER/metadata.json  the format's name
    FOLDER/config.json, generation_config.json, tokenizer files

The tensors are whole models', named as ``GPTModel.sharded_state_dict`` names them: layers, and experts, are stacked
along leading dimensions, and any layout takes its part. A training checkpoint RUN/checkpoints/step_N holds one such
folder for each model: ``policy`` and, with PPO, ``critic``.

A pickle can run anything when it is read. Here only the names below are let through; ``checked_metadata`` proves a
folder harmless and whole before megatron-core, which reads all of it without such care, is let at it.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_rlvr.config import ConfigError, rule

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"

_DCP = "torch.distributed.checkpoint"
_HARMLESS = {
    f"{_DCP}.metadata": "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
    "TensorProperties StorageMeta _MEM_FORMAT_ENCODING",
    f"{_DCP}.filesystem": "_StorageInfo",
    # megatron-core keeps the ranks' plans of writing in there too (strategies/state_dict_saver.py).
    f"{_DCP}.planner": "SavePlan WriteItem WriteItemType TensorWriteData",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "pathlib": "PosixPath",
}


def is_megatron_folder(path: str | Path) -> bool:
    """Whether the folder is a Megatron folder, by its ``.metadata``."""
    return (Path(path) / METADATA).is_file()


def model_folder(path: str | Path, model: str = "policy") -> Path:
    """``path``, or where that is a training checkpoint the folder of one of its models."""
    inside = Path(path) / model
    return inside if is_megatron_folder(inside) else Path(path)


def read_metadata(folder: str | Path) -> Metadata:
    """``.metadata`` through the list of harmless names. Raises ConfigError for anything else and for damage.

    Every file that it points to is a file of this folder and long enough.
    """
    path = Path(folder) / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Harmless(file).load()
        _check_files(Path(folder), metadata)
    except ConfigError:
        raise
    except Exception as error:  # a damaged pickle can end in any exception
        raise ConfigError(
            f"{path} cannot be read as a checkpoint's metadata: {error or type(error).__name__}"
        ) from error
    return metadata


def checked_metadata(folder: str | Path) -> Metadata:
    """``read_metadata``, and every stored object that is no tensor proven harmless too. Raises ConfigError."""
    with MegatronFolder(folder) as opened:
        for name, stored in opened.metadata.state_dict_metadata.items():
            if isinstance(stored, BytesStorageMetadata):
                opened.load(MetadataIndex(name))
    common = Path(folder) / COMMON
    try:
        torch.load(common, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"{common} cannot be read without trusting it: {error}") from error
    return opened.metadata


class MegatronFolder:
    """The tensors of a Megatron folder, read one at a time; a context manager that holds its files open."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ConfigError where the metadata is absent, damaged or not harmless."""
        self.folder = Path(folder)
        self.metadata = read_metadata(folder)
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: stored
            for name, stored in self.metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self._parts: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._stack = ExitStack()
        self._open: dict[str, IO[bytes]] = {}

    def __enter__(self) -> MegatronFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ConfigError for a tensor that is not there."""
        rule(name in self.tensors, f"{self.folder}: tensor {name} is missing")
        return tuple(self.tensors[name].size)

    def tensor(self, name: str, *index: int) -> Tensor:
        """The tensor, or its part at an index of its leading dimensions, joined from its chunks.

        tensor("decoder.layers.mlp.linear_fc2.weight", 3) is layer 3's, [hidden, ffn]. Raises ConfigError with the file
        and the tensor.
        """
        shape = self.shape(name)[len(index) :]
        chunks = self._chunks(name, len(index)).get(index, [])
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
            raise ConfigError(f"{self.folder}: of tensor {name}{list(index) or ''} parts are missing")
        whole = None
        for chunk in chunks:
            part = self._read(name, chunk).reshape(chunk.sizes[len(index) :])
            if len(chunks) == 1:
                return part
            whole = torch.empty(shape, dtype=part.dtype) if whole is None else whole
            place = zip(chunk.offsets[len(index) :], part.shape, strict=True)
            whole[tuple(slice(start, start + size) for start, size in place)] = part
        assert whole is not None
        return whole

    def load(self, entry: MetadataIndex) -> Any:
        """What is stored under an entry, with nothing but tensors and plain values let through. Raises ConfigError."""
        info = self.metadata.storage_data.get(entry)
        rule(info is not None, f"{self.folder / METADATA} does not say where {entry.fqn} is")
        if info.relative_path not in self._open:
            self._open[info.relative_path] = self._stack.enter_context((self.folder / info.relative_path).open("rb"))
        file = self._open[info.relative_path]
        file.seek(info.offset)
        try:
            return torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive, or a pickle that asks for more
            raise ConfigError(f"{self.folder / info.relative_path}: {entry.fqn} cannot be read: {error}") from error

    def _read(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        found = self.load(MetadataIndex(name, chunk.offsets))
        wanted = self.tensors[name].properties.dtype
        if not isinstance(found, Tensor) or found.shape != chunk.sizes or found.dtype != wanted:
            raise ConfigError(f"{self.folder}: {name} at {list(chunk.offsets)} is not {wanted} {list(chunk.sizes)}")
        return found

    def _chunks(self, name: str, depth: int) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
        """Chunks by their place in the first ``depth`` dimensions, in which each spans one index."""
        if (name, depth) not in self._parts:
            parts = defaultdict(list)
            for chunk in self.tensors[name].chunks:
                parts[tuple(chunk.offsets[:depth])].append(chunk)
            self._parts[name, depth] = parts
        return self._parts[name, depth]


class _Harmless(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _HARMLESS.get(module, "").split() or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def _check_files(folder: Path, metadata: Any) -> None:
    rule(isinstance(metadata, Metadata), f"{folder / METADATA} holds no checkpoint's metadata")
    needed: dict[str, int] = {}
    for info in metadata.storage_data.values():
        end = info.offset + info.length
        needed[info.relative_path] = max(end, needed.get(info.relative_path, 0))
        rule(0 <= info.offset < end, f"{folder / METADATA}: an entry of {info.relative_path} has no sound place")
    for name, size in needed.items():
        rule(Path(name).name == name, f"{folder / METADATA} points to {name!r}, outside of its folder")
        file = folder / name
        rule(file.is_file() and not file.is_symlink(), f"{file} is missing, although {METADATA} names it")
        rule(file.stat().st_size >= size, f"{file} is cut short: {file.stat().st_size} bytes of at least {size}")
