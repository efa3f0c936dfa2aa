"""Megatron names and shards <-> Hugging Face names and whole tensors: one table per model family.

Megatron cuts a model over tensor-parallel ranks and fuses what one matrix product can do at once:
query, key and value, interleaved per key-value group; gate and up, each rank holding its share of both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_rlvr.architecture import Architecture

Kind = Literal["vocab", "row", "qkv", "gate_up", "replicated"]


@dataclass(frozen=True)
class Row:
    """One kind of Megatron parameter; {} stands for the layer's global number.

    The local layer spec and Transformer Engine's name the norms before a linear differently, hence several names.
    """

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    kind: Kind


_LAYER, _HF_LAYER = "decoder.layers.{}.", "model.layers.{}."


def _layer(megatron: Sequence[str], hf: Sequence[str], kind: Kind) -> Row:
    return Row(tuple(_LAYER + name for name in megatron), tuple(_HF_LAYER + name for name in hf), kind)


_EMBEDDING = Row(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), "vocab")
_INPUT_NORM = _layer(
    ["input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"], ["input_layernorm.weight"], "replicated"
)
_QKV = _layer(
    ["self_attention.linear_qkv.weight"],
    ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "qkv",
)
_QKV_BIAS = _layer(
    ["self_attention.linear_qkv.bias"],
    ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
    "qkv",
)
_QUERY_NORM = _layer(["self_attention.q_layernorm.weight"], ["self_attn.q_norm.weight"], "replicated")
_KEY_NORM = _layer(["self_attention.k_layernorm.weight"], ["self_attn.k_norm.weight"], "replicated")
_ATTENTION_OUT = _layer(["self_attention.linear_proj.weight"], ["self_attn.o_proj.weight"], "row")
_MLP = [
    _layer(
        ["pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"],
        ["post_attention_layernorm.weight"],
        "replicated",
    ),
    _layer(["mlp.linear_fc1.weight"], ["mlp.gate_proj.weight", "mlp.up_proj.weight"], "gate_up"),
    _layer(["mlp.linear_fc2.weight"], ["mlp.down_proj.weight"], "row"),
]
_FINAL_NORM = Row(("decoder.final_layernorm.weight",), ("model.norm.weight",), "replicated")
_HEAD = Row(("output_layer.weight",), ("lm_head.weight",), "vocab")

TABLES: dict[str, list[Row]] = {
    "qwen2": [_EMBEDDING, _INPUT_NORM, _QKV, _QKV_BIAS, _ATTENTION_OUT, *_MLP, _FINAL_NORM, _HEAD],
    "qwen3": [_EMBEDDING, _INPUT_NORM, _QKV, _QUERY_NORM, _KEY_NORM, _ATTENTION_OUT, *_MLP, _FINAL_NORM, _HEAD],
}


@dataclass(frozen=True)
class Entry:
    """A row with its layer filled in.

    Entry(layer=3, megatron=("decoder.layers.3.mlp.linear_fc1.weight",),
          hf=("model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight"), kind="gate_up")
    """

    layer: int | None
    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    kind: Kind


class UnknownParameterError(KeyError):
    """A parameter that the family's table does not name."""


def entries(architecture: Architecture) -> list[Entry]:
    """Everything a Hugging Face checkpoint of this model holds, in its order: embedding, layers, final norm, head."""
    table = [row for row in TABLES[architecture.family] if not (architecture.tied and row is _HEAD)]
    per_layer = [row for row in table if row.megatron[0].startswith(_LAYER)]
    ordered = [_fill(_EMBEDDING, None)]
    ordered += [_fill(row, layer) for layer in range(architecture.num_layers) for row in per_layer]
    return ordered + [_fill(row, None) for row in table if row not in per_layer and row is not _EMBEDDING]


def _fill(row: Row, layer: int | None) -> Entry:
    def named(patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(pattern.format(layer) for pattern in patterns)

    return Entry(layer, named(row.megatron), named(row.hf), row.kind)


def find(architecture: Architecture, megatron_name: str) -> Entry:
    """The entry of a Megatron parameter with its global layer number.

    A tied model's last pipeline stage keeps a copy of the embedding as ``output_layer.weight``: it maps to the
    embedding. Raises UnknownParameterError with the name.
    """
    number = re.search(r"decoder\.layers\.(\d+)\.", megatron_name)
    pattern = re.sub(r"^(decoder\.layers\.)\d+\.", r"\1{}.", megatron_name)
    for row in TABLES[architecture.family]:
        if pattern in row.megatron:
            if row is _HEAD and architecture.tied:
                return Entry(None, _HEAD.megatron, _EMBEDDING.hf, "vocab")
            return _fill(row, int(number[1]) if number else None)
    raise UnknownParameterError(f"the {architecture.family} table names no Megatron parameter {megatron_name!r}")


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """name -> shape of every tensor in a Hugging Face checkpoint of this model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries(architecture):
        for name in entry.hf:
            shapes[name] = _hf_shape(architecture, name)
    return shapes


def _hf_shape(architecture: Architecture, name: str) -> tuple[int, ...]:
    hidden, ffn = architecture.hidden_size, architecture.ffn_size
    query, kv = architecture.query_size, architecture.kv_size
    module, leaf = name.split(".")[-2:]
    matrices = {
        "embed_tokens": (architecture.vocab_size, hidden),
        "lm_head": (architecture.vocab_size, hidden),
        "q_proj": (query, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
        "q_norm": (architecture.head_dim,),
        "k_norm": (architecture.head_dim,),
    }
    shape = matrices.get(module, (hidden,))
    return shape[:1] if leaf == "bias" else shape


def shard_shape(entry: Entry, architecture: Architecture, tp_size: int) -> tuple[int, ...]:
    """The shape of one tensor-parallel rank's Megatron parameter."""
    shapes = [_hf_shape(architecture, name) for name in entry.hf]
    if entry.kind == "replicated":
        return shapes[0]
    if entry.kind == "row":
        return (shapes[0][0], shapes[0][1] // tp_size)
    rows = architecture.padded_vocab(tp_size) if entry.kind == "vocab" else sum(shape[0] for shape in shapes)
    return (rows // tp_size, *shapes[0][1:])


def to_megatron(
    entry: Entry, tensors: Sequence[Tensor], architecture: Architecture, tp_rank: int, tp_size: int
) -> Tensor:
    """The whole Hugging Face tensors, in the order of ``entry.hf`` -> this rank's Megatron tensor, contiguous.

    Rows of the padded vocabulary are zero.
    """
    if entry.kind == "replicated":
        return tensors[0].contiguous()
    if entry.kind == "row":
        return tensors[0].chunk(tp_size, dim=1)[tp_rank].contiguous()
    if entry.kind == "gate_up":
        return torch.cat([tensor.chunk(tp_size)[tp_rank] for tensor in tensors])
    if entry.kind == "qkv":
        grouped = [tensor.unflatten(0, (architecture.num_kv_heads, -1)) for tensor in tensors]
        return torch.cat(grouped, dim=1).chunk(tp_size)[tp_rank].flatten(0, 1)
    whole, rows = tensors[0], architecture.padded_vocab(tp_size) // tp_size
    mine = whole[tp_rank * rows : (tp_rank + 1) * rows]
    padding = whole.new_zeros(rows - mine.shape[0], *whole.shape[1:])
    return torch.cat([mine, padding])


def to_hf(entry: Entry, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
    """Every rank's Megatron tensor, in rank order -> whole tensors in the order of ``entry.hf``, contiguous."""
    if entry.kind == "replicated":
        return [shards[0]]
    if entry.kind == "row":
        return [_joined(shards, dim=1)]
    if entry.kind == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        return [_joined([half[part] for half in halves], dim=0) for part in range(2)]
    whole = _joined(shards, dim=0)
    if entry.kind == "vocab":
        return [whole[: architecture.vocab_size]]
    queries = architecture.num_heads // architecture.num_kv_heads * architecture.head_dim
    grouped = whole.unflatten(0, (architecture.num_kv_heads, -1))
    parts = grouped.split([queries, architecture.head_dim, architecture.head_dim], dim=1)
    return [part.flatten(0, 1).contiguous() for part in parts]


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
