"""Random Qwen models of a few ten thousand parameters, as transformers makes and saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 131  # a multiple of nothing: every padding rule shows
END = 3


def make_model(family: str, tied: bool, seed: int = 0, layers: int = 4) -> Any:
    """A transformers model in fp32; no weight is zero or one by default, so that a wrong place always shows.

    head_dim * heads is twice the hidden size in qwen3 and equal to it in qwen2, which has no such setting.
    """
    config_class = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[family]
    config = config_class(
        hidden_size={"qwen2": 128, "qwen3": 64}[family],
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        eos_token_id=END,
        bos_token_id=None,
        pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        dtype="float32",
        **({"head_dim": 32} if family == "qwen3" else {}),
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return model


def save_model(folder: Path, family: str, tied: bool, seed: int = 0, **options: Any) -> Any:
    """The model, saved in ``folder`` (single file unless max_shard_size says otherwise)."""
    model = make_model(family, tied, seed)
    model.save_pretrained(folder, **options)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return model


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """What its checkpoint holds: a tied head is not in it."""
    tied = model.config.tie_word_embeddings
    return {
        name: tensor.clone() for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }
