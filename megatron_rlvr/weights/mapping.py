"""Megatron names and shards <-> Hugging Face names and whole tensors: one table per model family.

Megatron cuts a model over tensor-parallel ranks and fuses what one matrix product can do at once:
query, key and value, interleaved per key-value group; gate and up, each rank holding its share of both. In a Megatron
folder (weights/megatron_folder.py) the same tensors stand whole, a layer's and an expert's stacked under one name.
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
    """One kind of Megatron parameter; {} stands for the layer's global number, a second one for the expert's.

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
_EXPERT = "mlp.experts.local_experts.{}."
_MIXTURE = [
    _MLP[0],
    _layer(["mlp.router.weight"], ["mlp.gate.weight"], "replicated"),
    _layer(
        [f"{_EXPERT}linear_fc1.weight"],
        ["mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"],
        "gate_up",
    ),
    _layer([f"{_EXPERT}linear_fc2.weight"], ["mlp.experts.{}.down_proj.weight"], "row"),
]
_FINAL_NORM = Row(("decoder.final_layernorm.weight",), ("model.norm.weight",), "replicated")
_HEAD = Row(("output_layer.weight",), ("lm_head.weight",), "vocab")

TABLES: dict[str, list[Row]] = {
    "qwen2": [_EMBEDDING, _INPUT_NORM, _QKV, _QKV_BIAS, _ATTENTION_OUT, *_MLP, _FINAL_NORM, _HEAD],
    "qwen3": [_EMBEDDING, _INPUT_NORM, _QKV, _QUERY_NORM, _KEY_NORM, _ATTENTION_OUT, *_MLP, _FINAL_NORM, _HEAD],
    "llama": [_EMBEDDING, _INPUT_NORM, _QKV, _ATTENTION_OUT, *_MLP, _FINAL_NORM, _HEAD],
    "qwen3_moe": [_EMBEDDING, _INPUT_NORM, _QKV, _QUERY_NORM, _KEY_NORM, _ATTENTION_OUT, *_MIXTURE, _FINAL_NORM, _HEAD],
}
# The linear layers whose (empty) extra state Megatron stores beside their weights.
_WITH_STATE = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


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
    expert: int | None = None

    @property
    def place(self) -> tuple[int, ...]:
        """The index, in a Megatron folder, among what is stacked under one name: (), (layer,) or (layer, expert)."""
        return tuple(number for number in (self.layer, self.expert) if number is not None)

    @property
    def stored(self) -> tuple[str, ...]:
        """The names that a Megatron folder may store it under; the first is what the local layer spec gives."""
        names = [re.sub(r"^(decoder\.layers\.)\d+\.", r"\1", name) for name in self.megatron]
        return tuple(re.sub(r"local_experts\.\d+\.", "experts.", name) for name in reversed(names))


class UnknownParameterError(KeyError):
    """A parameter that the family's table does not name."""


def entries(architecture: Architecture) -> list[Entry]:
    """Everything a Hugging Face checkpoint of this model holds, in its order: embedding, layers, final norm, head."""
    table = [row for row in TABLES[architecture.family] if not (architecture.tied and row is _HEAD)]
    per_layer = [row for row in table if row.megatron[0].startswith(_LAYER)]
    each = [row for row in per_layer if _EXPERT not in row.megatron[0]]
    of_experts = [row for row in per_layer if row not in each]
    count = architecture.experts.count if architecture.experts else 0
    ordered = [_fill(_EMBEDDING, None)]
    for layer in range(architecture.num_layers):
        ordered += [_fill(row, layer) for row in each]
        ordered += [_fill(row, layer, expert) for expert in range(count) for row in of_experts]
    return ordered + [_fill(row, None) for row in table if row not in per_layer and row is not _EMBEDDING]


def _fill(row: Row, layer: int | None, expert: int | None = None) -> Entry:
    def named(patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(pattern.format(layer, expert) for pattern in patterns)

    return Entry(layer, named(row.megatron), named(row.hf), row.kind, expert)


def find(architecture: Architecture, megatron_name: str) -> Entry:
    """The entry of a Megatron parameter with its global layer number.

    A tied model's last pipeline stage keeps a copy of the embedding as ``output_layer.weight``: it maps to the
    embedding. Raises UnknownParameterError with the name.
    """
    numbers = [int(number) for number in re.findall(r"(?:^decoder\.layers|local_experts)\.(\d+)\.", megatron_name)]
    pattern = re.sub(r"(^decoder\.layers|local_experts)\.\d+\.", r"\1.{}.", megatron_name)
    for row in TABLES[architecture.family]:
        if pattern in row.megatron:
            if row is _HEAD and architecture.tied:
                return Entry(None, _HEAD.megatron, _EMBEDDING.hf, "vocab")
            return _fill(row, *numbers) if numbers else _fill(row, None)
    raise UnknownParameterError(f"the {architecture.family} table names no Megatron parameter {megatron_name!r}")


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """name -> shape of every tensor in a Hugging Face checkpoint of this model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries(architecture):
        for name in entry.hf:
            shapes[name] = hf_shape(architecture, name)
    return shapes


def hf_shape(architecture: Architecture, name: str) -> tuple[int, ...]:
    """The shape of one tensor of a Hugging Face checkpoint."""
    hidden, ffn = architecture.hidden_size, architecture.ffn_size
    query, kv = architecture.query_size, architecture.kv_size
    module, leaf = name.split(".")[-2:]
    if architecture.experts and ".experts." in name:
        ffn = architecture.experts.ffn_size
    elif architecture.experts and module == "gate":
        return (architecture.experts.count, hidden)
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
    shapes = [hf_shape(architecture, name) for name in entry.hf]
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


def stored_shape(entry: Entry, architecture: Architecture, tp_size: int) -> tuple[int, ...]:
    """The shape in a Megatron folder, of all that is stacked; ``tp_size`` sets how far the vocabulary is padded."""
    stacked = (architecture.num_layers, architecture.experts.count if architecture.experts else 0)[: len(entry.place)]
    if entry.kind == "vocab":
        return (architecture.padded_vocab(tp_size), architecture.hidden_size)
    return (*stacked, *shard_shape(entry, architecture, 1))


def stored_vocab(rows: Tensor, architecture: Architecture, tp_size: int) -> Tensor:
    """[V, H] -> the padded [V', H] that a Megatron folder stores."""
    padding = rows.new_zeros(architecture.padded_vocab(tp_size) - len(rows), rows.shape[1])
    return torch.cat([rows, padding])


def extra_state(entry: Entry, shape: tuple[int, ...]) -> str | None:
    """The name of the empty state that goes with an entry of stored ``shape`` in a Megatron folder, if one does."""
    name = entry.stored[0]
    if not name.endswith(_WITH_STATE):
        return None
    places, sizes = (".".join(map(str, numbers)) for numbers in (entry.place, shape[: len(entry.place)]))
    return f"{name.removesuffix('weight')}_extra_state/shard_{places}_{sizes}"


def to_hf(entry: Entry, shards: Tensor | Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
    """Every rank's Megatron tensor, in rank order -> whole tensors in the order of ``entry.hf``, contiguous.

    ``shards`` that lie behind one another as one tensor, the embedding's above all, are not copied to be joined.
    """
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


def _joined(parts: Tensor | Sequence[Tensor], dim: int) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return parts.flatten(0, 1) if isinstance(parts, Tensor) and dim == 0 else torch.cat(list(parts), dim=dim)
