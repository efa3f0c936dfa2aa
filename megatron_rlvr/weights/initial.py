"""Random weights as a Hugging Face folder: every run starts from a folder, and every layout from the same one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.weights.mapping import hf_shapes
from megatron_rlvr.weights.partial_folder import companions, readable, replacing, write_companions

STD = 0.02  # of the matrices, where config.json gives no initializer_range


def write_initial(source: str | Path, target: str | Path, seed: int) -> None:
    """``source``'s config and tokenizer with weights drawn from ``seed``, in the place of what lies there.

    Matrices are N(0, initializer_range), norms 1, biases 0. One process writes. Raises ConfigError for a source that is
    no supported model.
    """
    source, target = Path(source), Path(target)
    architecture = Architecture.from_folder(source)
    std = json.loads((source / "config.json").read_text()).get("initializer_range", STD)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in hf_shapes(architecture).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
        else:
            weights[name] = std * torch.randn(shape, generator=generator)
    with replacing(target) as partial:
        write_companions(companions(source), partial, "float32")
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        readable(partial / "model.safetensors")
