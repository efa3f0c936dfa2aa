"""Hugging Face folders in and out: safetensors -> Megatron parameters, and whole tensors -> a new folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import ConfigError
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.weights import mapping
from megatron_rlvr.weights.gather import global_parameters

SHARD_BYTES = 4 << 30
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a Hugging Face folder, read one at a time; a context manager that holds its files open."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = self._locate()
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def _locate(self) -> dict[str, str]:
        """tensor name -> file name. Raises ConfigError when the folder has no safetensors."""
        if (self.folder / _INDEX).is_file():
            return json.loads((self.folder / _INDEX).read_text())["weight_map"]
        if not (self.folder / _SINGLE).is_file():
            raise ConfigError(f"{self.folder} holds neither {_SINGLE} nor {_INDEX}: give a folder with safetensors")
        try:
            with safe_open(self.folder / _SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), _SINGLE)
        except SafetensorError as error:
            raise ConfigError(f"{self.folder / _SINGLE} cannot be read, from its first tensor on: {error}") from error

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def check(self, shapes: dict[str, tuple[int, ...]], ignored: Sequence[str] = ()) -> None:
        """Whether the folder holds exactly these tensors. Raises ConfigError with the first wrong one and its file."""
        for name, shape in shapes.items():
            if name not in self.files:
                raise ConfigError(f"{self.folder}: tensor {name} is missing")
            found = tuple(self._file(name).get_slice(name).get_shape())
            if found != shape:
                raise ConfigError(
                    f"{self._path(name)}: tensor {name} has shape {list(found)}, config.json asks for {list(shape)}"
                )
        unknown = sorted(set(self.files) - set(shapes) - set(ignored))
        if unknown:
            raise ConfigError(
                f"{self._path(unknown[0])}: tensor {unknown[0]} is not part of the model ({len(unknown)} such)"
            )

    def tensor(self, name: str) -> Tensor:
        return self._file(name).get_tensor(name)

    def _path(self, name: str) -> Path:
        return self.folder / self.files[name]

    def _file(self, name: str) -> Any:
        path = self._path(name)
        if path.name not in self._open:
            try:
                self._open[path.name] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{path}, wanted for tensor {name}, cannot be read: {error}") from error
        file = self._open[path.name]
        if name not in set(file.keys()):
            raise ConfigError(f"{path}: tensor {name} is missing, although {_INDEX} names it there")
        return file


@torch.no_grad()
def load_hf(
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    groups: ParallelGroups,
    path: str | Path,
    absent: Sequence[str] = (),
) -> None:
    """Fill this rank's chunks from a Hugging Face folder, one tensor in memory at a time, converted to their dtype.

    ``absent`` names Megatron parameters that no folder holds (a critic's head); they are left as they are.
    Raises ConfigError, before anything is written, for a file that is absent or cut short and for a tensor that is
    missing, unknown or of another shape.
    """
    with Checkpoint(path) as checkpoint:
        # Some tied checkpoints carry the head all the same, old ones the rotary table.
        shapes = mapping.hf_shapes(architecture)
        spare = [name for name in checkpoint.files if name.endswith("rotary_emb.inv_freq")]
        checkpoint.check(shapes, [*spare, "lm_head.weight"] if architecture.tied else spare)
        for name, parameter in global_parameters(chunks).items():
            if name in absent:
                continue
            entry = mapping.find(architecture, name)
            tensors = [checkpoint.tensor(source) for source in entry.hf]
            shard = mapping.to_megatron(entry, tensors, architecture, groups.tp_rank, groups.tp_size)
            parameter.copy_(shard)


def save_hf(
    weights: Iterator[tuple[str, Tensor]], source: str | Path, destination: str | Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write (name, whole tensor) with the config and tokenizer of ``source`` as a folder that transformers loads.

    One process writes; at most ``shard_bytes`` of tensors are held at a time. The folder is written beside
    ``destination`` and renamed when complete, replacing an earlier one: a reader never sees half of it.
    """
    source, destination = Path(source), Path(destination)
    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = _write_shards(weights, partial, shard_bytes)
    _copy_companions(source, partial, dtype)
    if destination.exists():
        shutil.rmtree(destination)
    partial.rename(destination)


def _write_shards(weights: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> str:
    """Safetensors files and, for more than one, their index. Returns the dtype's name ("bfloat16")."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0
    dtype = ""

    def flush() -> None:
        save_file(held, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
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
        (folder / "0.safetensors").rename(folder / _SINGLE)
        return dtype
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for number, file in enumerate(files):
        (folder / f"{number}.safetensors").rename(folder / file)
    located = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": located}
    (folder / _INDEX).write_text(json.dumps(index, indent=2))
    return dtype


def _copy_companions(source: Path, folder: Path, dtype: str) -> None:
    """Config, generation config, tokenizer and chat template; the config names the dtype that was written."""
    for file in sorted(source.iterdir()):
        if file.suffix in {".json", ".txt", ".jinja", ".model"} and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2))
