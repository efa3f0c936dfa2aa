"""What a folder holds, and whether two hold the same model: every tensor's bits, then the logits of both."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlvr import platform
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config, ModelConfig, rule
from megatron_rlvr.distributed import groups as process_groups
from megatron_rlvr.models.attention import PackedSequences
from megatron_rlvr.models.build import build_chunks, initialize_parallel
from megatron_rlvr.processes import free_port
from megatron_rlvr.weights.convert import load_hf
from megatron_rlvr.weights.megatron_folder import checked_metadata, is_megatron_folder, model_folder
from megatron_rlvr.weights.sources import MegatronWeights, open_source

TOKENS = 64
LOGITS = 1e-5  # of the largest logit: what differs between two orders of fp32 sums


@torch.no_grad()
def differing_tensors(
    hf: str | Path, megatron: str | Path, advance: Callable[[int, int], None] | None = None
) -> list[str]:
    """The tensors that are not bit for bit the same in both folders, each with the first difference in words.

    One tensor of each is in memory at a time. Raises ConfigError for a folder that is damaged or of another model.
    """
    folder = model_folder(megatron)
    architecture = Architecture.from_folder(hf, key="--hf")
    found = []
    with open_source(hf, architecture) as one, open_source(folder, architecture) as other:
        names = list(one.check_model(architecture))
        other.check_model(architecture)
        for number, name in enumerate(names, 1):
            if difference := _difference(one.tensor(name), other.tensor(name)):
                found.append(f"{name}: {difference}")
            if advance:
                advance(number, len(names))
        heads = one.value_head(), other.value_head()
        rule(heads[0].keys() == heads[1].keys(), "only one of the two folders holds a critic")
        found += [f"value head {leaf}" for leaf in heads[0] if _difference(heads[0][leaf], heads[1][leaf])]
    return found


def _difference(one: Tensor, other: Tensor) -> str:
    if one.dtype != other.dtype or one.shape != other.shape:
        return f"{one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    one, other = one.view(as_bits), other.view(as_bits)
    return "" if torch.equal(one, other) else f"{int((one != other).sum())} of {one.numel()} values"


@torch.no_grad()
def logits_difference(hf: str | Path, megatron: str | Path) -> tuple[float, float]:
    """(largest |difference|, largest |logit|) of transformers' and Megatron's logits of random tokens, in fp32.

    Holds one model after the other. The process becomes the only rank of a process group while it lasts.
    """
    from transformers import AutoModelForCausalLM

    folder = model_folder(megatron)
    architecture = Architecture.from_folder(folder, key="--megatron")
    ids = torch.randint(architecture.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager")
    expected = model(ids[None]).logits[0]
    del model
    found = _megatron_logits(folder, architecture, ids)
    return float((found - expected).abs().max()), float(expected.abs().max())


def _megatron_logits(folder: Path, architecture: Architecture, ids: Tensor) -> Tensor:
    """ids [t] -> logits [t, V] fp32 of a model on this one rank."""
    address = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    os.environ.update({name: str(value) for name, value in address.items()})
    platform.start_rank()
    process_groups.init(timeout_seconds=60)
    try:
        config = Config(model=ModelConfig(path=str(folder), dtype="float32"))
        groups = initialize_parallel(config)
        (chunk,) = build_chunks(config, architecture, groups)
        load_hf([chunk], architecture, groups, folder)
        ids = ids.to(platform.device())
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32, device=ids.device)
        packed, places = PackedSequences.from_cu_seqlens(bounds), torch.arange(len(ids), device=ids.device)
        with platform.megatron_calls():
            logits = chunk.eval()(ids[None], places[None], attention_mask=None, packed_seq_params=packed)
        return logits.flatten(0, 1)[:, : architecture.vocab_size].float().cpu()
    finally:
        process_groups.destroy()


def describe(path: str | Path) -> dict[str, Any]:
    """What a folder holds, Megatron's or Hugging Face's, from its headers alone. Raises ConfigError."""
    folder = model_folder(path)
    architecture = Architecture.from_folder(folder, key="folder")
    if is_megatron_folder(folder):
        checked_metadata(folder)
    with open_source(folder, architecture) as source:
        layouts = {name: source.layout(name) for name in source.check_model(architecture)}
        heads = source.value_head()
        megatron = source.megatron if isinstance(source, MegatronWeights) else None
        rows = megatron.shape("embedding.word_embeddings.weight")[0] if megatron else None
    return {
        "format": "megatron" if rows else "hugging face",
        "holds": f"a critic of {len(heads['bias'])} heads" if heads else "a language model",
        **asdict(architecture),
        "padded_vocab": rows,
        "tensors": len(layouts),
        "parameters": sum(math.prod(shape) for shape, _ in layouts.values()),
        "dtypes": sorted({str(dtype).removeprefix("torch.") for _, dtype in layouts.values()}),
    }


def report(
    hf: str | Path, megatron: str | Path, tensors_only: bool, advance: Callable[[int, int], None] | None = None
) -> int:
    """Print what differs between the two folders, and by how much a policy's logits do. Returns 1 where any does."""
    differing = differing_tensors(hf, megatron, advance)
    print("\n".join(f"differs: {line}" for line in differing) or "every tensor is bit for bit the same")
    if tensors_only or "critic" in describe(hf)["holds"]:  # a critic has no logits: its tensors say all
        return int(bool(differing))
    gap, largest = logits_difference(hf, megatron)
    print(f"logits differ by up to {gap:.1e}, the largest is {largest:.1f}")
    return int(bool(differing) or gap > LOGITS * max(1.0, largest))
