"""Where a model's weights are read from, by their Hugging Face names: a Hugging Face folder, or a Megatron folder."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import ConfigError, rule
from megatron_rlvr.weights import mapping
from megatron_rlvr.weights.mapping import Entry
from megatron_rlvr.weights.megatron_folder import MegatronFolder, is_megatron_folder

VALUE_HEAD = "value_head.safetensors"  # a critic's head beside its trunk in a Hugging Face folder: weight, bias
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.")  # beside them a checkpoint may hold an optimizer's tensors


class Source(ABC):
    """The tensors of a folder, read one at a time; a context manager that holds its files open."""

    folder: Path
    files: dict[str, str]  # tensor -> the file that holds it, or in a Megatron folder its stacked tensor

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The whole tensor. Raises ConfigError with file and tensor for a damaged one."""

    @abstractmethod
    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Its shape and dtype, without reading it."""

    @abstractmethod
    def value_head(self) -> dict[str, Tensor]:
        """A critic's "weight" [K, H] and "bias" [K]; empty for a language model."""

    def check(self, shapes: dict[str, tuple[int, ...]], ignored: Sequence[str] = ()) -> None:
        """Whether the folder holds exactly these tensors. Raises ConfigError with the first wrong one and its file."""
        for name, shape in shapes.items():
            rule(name in self.files, f"{self.folder}: tensor {name} is missing")
            found = self.layout(name)[0]
            rule(
                found == shape,
                f"{self.path(name)}: tensor {name} has shape {list(found)}, config.json asks for {list(shape)}",
            )
        if unknown := sorted(set(self.files) - set(shapes) - set(ignored)):
            raise ConfigError(
                f"{self.path(unknown[0])}: tensor {unknown[0]} is not part of the model ({len(unknown)} such)"
            )

    def check_model(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """``check`` for a model: the shape of every tensor that the folder must hold, and does. Raises ConfigError."""
        shapes = mapping.hf_shapes(architecture)
        # Some tied checkpoints carry the head all the same, old ones the rotary table.
        spare = [name for name in self.files if name.endswith("rotary_emb.inv_freq")]
        if self.value_head():
            shapes.pop(_HEAD, None)
        elif architecture.tied:
            spare.append(_HEAD)
        self.check(shapes, spare)
        if _HEAD in self.files and _HEAD in spare:
            # transformers ties them only where they agree, and takes the head where it is another (modeling_utils.py)
            rule(
                torch.equal(self.tensor(_HEAD), self.tensor(_EMBEDDING)),
                f"{self.path(_HEAD)}: config.json ties {_HEAD} to {_EMBEDDING}, but they differ: set "
                f"tie_word_embeddings to false there, or remove {_HEAD}",
            )
        return shapes

    def path(self, name: str) -> Path:
        return self.folder / self.files[name]


def open_source(path: str | Path, architecture: Architecture) -> Source:
    """The folder's weights, whichever kind of folder it is. Raises ConfigError when it is neither."""
    return MegatronWeights(path, architecture) if is_megatron_folder(path) else Checkpoint(path)


class Checkpoint(Source):
    """A Hugging Face folder of safetensors, whose tensors are pages of its files until they are changed."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.files = self._locate()
        self._open: dict[str, Any] = {}
        self._names: dict[str, set[str]] = {}

    def _locate(self) -> dict[str, str]:
        if (self.folder / INDEX).is_file():
            return self._read_index()
        if not (self.folder / SINGLE).is_file():
            raise ConfigError(f"{self.folder} holds neither {SINGLE} nor {INDEX}: give a folder with safetensors")
        try:
            with safe_open(self.folder / SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        except SafetensorError as error:
            raise ConfigError(f"{self.folder / SINGLE} cannot be read, from its first tensor on: {error}") from error

    def _read_index(self) -> dict[str, str]:
        index = self.folder / INDEX
        try:
            files = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{index} is no index of safetensors: {error!r}") from error
        for name, file in files.items():
            rule(
                isinstance(file, str) and Path(file).name == file,
                f"{index}: tensor {name} is said to be in {file!r}, which is no file of this folder",
            )
        rule(
            SINGLE in files.values() or not (self.folder / SINGLE).exists(),
            f"{self.folder} holds {SINGLE}, and {INDEX}, which does not name it: each says what the weights are, so "
            f"remove the one that is left over of another model",
        )
        for file in sorted(self.folder.glob("model-*-of-*.safetensors")):
            rule(file.name in files.values(), f"{file} is not named by {INDEX}: a shard of another model?")
        return files

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        tensor = self._file(name).get_slice(name)
        stored = tensor.get_dtype()
        rule(stored in _DTYPES, f"{self.path(name)}: tensor {name} has dtype {stored}, which is not supported")
        return tuple(tensor.get_shape()), _DTYPES[stored]

    def tensor(self, name: str) -> Tensor:
        return self._file(name).get_tensor(name)

    def value_head(self) -> dict[str, Tensor]:
        path = self.folder / VALUE_HEAD
        if not path.is_file():
            return {}
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in ("weight", "bias")}
        except SafetensorError as error:
            raise ConfigError(f"{path} cannot be read as a critic's weight and bias: {error}") from error

    def _file(self, name: str) -> Any:
        path = self.path(name)
        if path.name not in self._open:
            try:
                self._open[path.name] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{path}, wanted for tensor {name}, cannot be read: {error}") from error
            self._names[path.name] = set(self._open[path.name].keys())
        rule(name in self._names[path.name], f"{path}: tensor {name} is missing, although {INDEX} names it there")
        return self._open[path.name]


class MegatronWeights(Source):
    """A Megatron folder of any layout, its tensors taken apart again into those of Hugging Face."""

    def __init__(self, folder: str | Path, architecture: Architecture) -> None:
        super().__init__()
        self.folder, self.architecture = Path(folder), architecture
        self.megatron = self._stack.enter_context(MegatronFolder(folder))
        self._entries = {name: entry for entry in mapping.entries(architecture) for name in entry.hf}
        if self._is_critic:
            self._entries.pop(_HEAD, None)
        self.files = {name: self._stored(entry) for name, entry in self._entries.items() if self._stored(entry)}
        known = {*self.files.values(), *(("output_layer.weight", "output_layer.bias") if self._is_critic else ())}
        for name in self.megatron.tensors:
            if name.startswith(_OF_THE_MODEL) and name not in known:
                self.files[name] = name
        self._last: tuple[Entry | None, dict[str, Tensor]] = (None, {})

    @property
    def _is_critic(self) -> bool:
        return "output_layer.bias" in self.megatron.tensors

    def _stored(self, entry: Entry) -> str:
        """The name that the folder has for an entry; empty where it has none."""
        return next((name for name in entry.stored if name in self.megatron.tensors), "")

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        entry, stored = self._entries[name], self.files[name]
        shape, whole = self.megatron.shape(stored), mapping.stored_shape(entry, self.architecture, 1)
        if is_vocab := entry.kind == "vocab":
            whole = (self.architecture.vocab_size, *whole[1:])
        rule(
            shape == whole or (is_vocab and shape[0] > whole[0] and shape[1:] == whole[1:]),
            f"{self.folder}: tensor {stored} has shape {list(shape)}, config.json asks for {list(whole)}"
            + " or more rows" * is_vocab,
        )
        return mapping.hf_shape(self.architecture, name), self.megatron.tensors[stored].properties.dtype

    def tensor(self, name: str) -> Tensor:
        entry = self._entries[name]
        if self._last[0] is not entry:
            self._last = (None, {})  # free it before the next one is read
            whole = self.megatron.tensor(self.files[name], *entry.place)
            parts = mapping.to_hf(entry, [whole], self.architecture)
            self._last = (entry, dict(zip(entry.hf, parts, strict=True)))
        return self._last[1][name]

    def value_head(self) -> dict[str, Tensor]:
        if not self._is_critic:
            return {}
        return {leaf: self.megatron.tensor(f"output_layer.{leaf}") for leaf in ("weight", "bias")}
