"""Random models of a few ten thousand parameters, as transformers makes and saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 131  # a multiple of nothing: every padding rule shows
END = 3


CONFIGS = {
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "llama": transformers.LlamaConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_size": 128},  # which has no head_dim of its own
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
}


def make_model(family: str, tied: bool, seed: int = 0, layers: int = 4, **changes: Any) -> Any:
    """A transformers model in fp32; no weight is zero or one by default, so that a wrong place always shows.

    head_dim * heads is twice the hidden size, and equal to it in qwen2; the rotary base is no family's default.
    """
    settings = dict(
        hidden_size=64,
        head_dim=32,
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
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        dtype="float32",
    )
    config = CONFIGS[family](**settings | OF_FAMILY.get(family, {}) | changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return model


def save_model(folder: Path, family: str, tied: bool, seed: int = 0, shard: str = "1GB", **changes: Any) -> Any:
    """The model, saved in ``folder``: a single file unless ``shard``, the largest size of one, says otherwise."""
    model = make_model(family, tied, seed, **changes)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return model


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """What its checkpoint holds: a tied head is not in it."""
    tied = model.config.tie_word_embeddings
    return {
        name: tensor.clone() for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }
