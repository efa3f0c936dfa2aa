"""Tiny random Hugging Face folders, configs and rollouts: every weight matters and no two parts are alike."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from megatron_rlvr.config import Config, from_dict
from megatron_rlvr.types import Prompt, Rollout, RolloutGroup

VOCAB = 211  # a prime: no number of ranks divides it, and Megatron pads it to 256 columns

FAMILIES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}


def make_folder(path: Path, family: str = "qwen3", tied: bool = False, seed: int = 0, **shape: Any) -> Path:
    """``path`` with config.json and fp32 safetensors of a random model: 4 layers, hidden 64, 4 heads, 2 kv heads of 16.

    Norms and biases are random too, so that a misplaced one shows; weights are wide enough for peaked distributions.
    There is no pad token, whose embedding row would be zero and without a gradient.
    """
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**settings | shape), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(1.5 * parameter.shape[1] ** -0.5 * noise)
    model.save_pretrained(path)
    return path


def make_critic(model: Path, folder: Path) -> Path:
    """``folder`` with a critic: the trunk of the model in ``model`` under three heads."""
    shutil.copytree(model, folder)
    tensors = load_file(model / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    generator = torch.Generator().manual_seed(5)
    size = tensors["model.norm.weight"].numel()
    head = {"weight": torch.randn(3, size, generator=generator), "bias": torch.randn(3, generator=generator)}
    save_file(head, folder / "value_head.safetensors")
    return folder


def make_config(path: Path, tree: dict[str, dict[str, Any]] | None = None) -> Config:
    """A fp32 config of the model in ``path``; ``tree`` changes sections of it: {"parallel": {"tp": 2}}."""
    sections: dict[str, dict[str, Any]] = {"model": {"path": str(path), "dtype": "float32"}}
    for section, values in (tree or {}).items():
        sections[section] = sections.get(section, {}) | values
    return from_dict(Config, sections)


def make_groups(prompts: int, responses: int, seed: int = 0, longest: int = 14) -> list[RolloutGroup]:
    """Random token sequences of every length from 1 to ``longest``, prompt and response, with random log-probs."""
    draw = random.Random(seed)

    def tokens(least: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(draw.randint(least, longest))]

    def rollout(index: int) -> Rollout:
        response = tokens(1)
        return Rollout(index, response, [-draw.expovariate(0.5) for _ in response], "stop", policy_version=0)

    return [
        RolloutGroup(
            Prompt(f"prompt/{row}", "", tuple(tokens(1)), "toy", None), [rollout(index) for index in range(responses)]
        )
        for row in range(prompts)
    ]
