"""A Hugging Face folder from nothing: 16 characters and 3 special tokens, Qwen3-shaped config, random weights.

0.82 M parameters: large enough to learn the puzzles, small enough for two CPU cores.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.weights.mapping import hf_shapes

END, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"
TOKENS = [*"0123456789", *"+-*", *",=>", END, PAD, UNKNOWN]  # a digit's id is the digit itself

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 576,
    "hidden_act": "silu",
    "vocab_size": len(TOKENS),
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "bos_token_id": None,
    "eos_token_id": TOKENS.index(END),
    "pad_token_id": TOKENS.index(PAD),
    "dtype": "float32",
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; nothing is learned, so nothing depends on a corpus."""
    characters = Tokenizer(models.WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token=UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def write(folder: Path, seed: int) -> None:
    """The whole folder, with weights drawn from ``seed``: norms 1, embedding N(0, 1), the rest N(0, 1 / 3 columns).

    That is the spread of torch's own layers. At this width the usual 0.02 is so small beside AdamW's steps that
    reinforcement learning forgets what the warm-up taught.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    ends = {key: CONFIG[key] for key in ("eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2))
    tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in hf_shapes(Architecture.from_folder(folder)).items():
        std = 1.0 if "embed_tokens" in name else (3 * shape[-1]) ** -0.5
        weights[name] = (
            torch.ones(shape) if name.endswith("norm.weight") else std * torch.randn(shape, generator=generator)
        )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
