"""The tables: every tensor cut and joined again, bit for bit, and each rank's part where Megatron wants it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megatron_rlvr.architecture import Architecture, Experts
from megatron_rlvr.weights import mapping

SHAPES = {
    family: Architecture(
        family=family, num_layers=2, hidden_size=24, num_heads=8, num_kv_heads=4, head_dim=6, ffn_size=40,
        vocab_size=300, tied=False, qk_norm=family.startswith("qwen3"), qkv_bias=family == "qwen2", rope_theta=1e4,
        rms_eps=1e-6, max_positions=64, experts=Experts(6, 2, 16, True) if family == "qwen3_moe" else None,
    )
    for family in ("qwen2", "qwen3", "llama", "qwen3_moe")
}  # fmt: skip


def random_weights(shape: Architecture) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(size) for name, size in mapping.hf_shapes(shape).items()}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", SHAPES)
def test_round_trip_is_bit_exact(family, tp):
    shape = SHAPES[family]
    weights, rebuilt = random_weights(shape), {}
    for entry in mapping.entries(shape):
        tensors = [weights[name] for name in entry.hf]
        shards = [mapping.to_megatron(entry, tensors, shape, rank, tp) for rank in range(tp)]
        assert all(shard.is_contiguous() for shard in shards), entry
        assert {tuple(shard.shape) for shard in shards} == {mapping.shard_shape(entry, shape, tp)}, entry
        whole = mapping.to_hf(entry, shards, shape)
        assert all(tensor.is_contiguous() for tensor in whole), entry
        rebuilt |= dict(zip(entry.hf, whole, strict=True))
    assert list(rebuilt) == list(weights)
    assert all(torch.equal(rebuilt[name], weights[name]) for name in weights)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", SHAPES)
def test_names_and_shapes_are_those_of_transformers(family, tied, tmp_path):
    from tests.weights.tiny_models import save_model

    save_model(tmp_path, family, tied)
    expected = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert mapping.hf_shapes(Architecture.from_folder(tmp_path)) == expected


def test_experts_have_numbers_of_their_own():
    shape = SHAPES["qwen3_moe"]
    entry = mapping.find(shape, "decoder.layers.1.mlp.experts.local_experts.4.linear_fc1.weight")
    assert entry.hf == tuple(f"model.layers.1.mlp.experts.4.{name}_proj.weight" for name in ("gate", "up"))
    assert entry in mapping.entries(shape) and len(mapping.entries(shape)) == 3 + 2 * (7 + 2 * 6)
    assert entry.stored == ("decoder.layers.mlp.experts.experts.linear_fc1.weight",) and entry.place == (1, 4)
    whole = mapping.stored_shape(entry, shape, tp_size=2)
    assert whole == (2, 6, 32, 24)
    assert mapping.extra_state(entry, whole) == (
        "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_1.4_2.6"
    )
    table = mapping.find(shape, "embedding.word_embeddings.weight")
    assert mapping.stored_shape(table, shape, tp_size=4) == (512, 24) and mapping.extra_state(table, (512, 24)) is None


def test_each_key_value_group_keeps_its_queries_together():
    shape = SHAPES["qwen3"]  # 8 query heads, 4 key-value heads: groups of 2 + 1 + 1 heads of 6 rows
    entry = mapping.find(shape, "decoder.layers.1.self_attention.linear_qkv.weight")
    query, key, value = (random_weights(shape)[name] for name in entry.hf)
    second = mapping.to_megatron(entry, [query, key, value], shape, tp_rank=1, tp_size=4)
    expected = torch.cat([query[12:24], key[6:12], value[6:12]])
    assert torch.equal(second, expected)


def test_gate_and_up_are_cut_before_they_are_joined():
    shape = SHAPES["qwen3"]
    entry = mapping.find(shape, "decoder.layers.0.mlp.linear_fc1.weight")
    gate, up = (random_weights(shape)[name] for name in entry.hf)
    assert torch.equal(mapping.to_megatron(entry, [gate, up], shape, 1, 2), torch.cat([gate[20:], up[20:]]))


def test_rows_behind_the_vocabulary_are_zero():
    shape = SHAPES["qwen3"]
    entry = mapping.find(shape, "embedding.word_embeddings.weight")
    table = random_weights(shape)["model.embed_tokens.weight"]
    last = mapping.to_megatron(entry, [table], shape, tp_rank=1, tp_size=2)
    assert last.shape == (256, 24)
    assert torch.equal(last[:44], table[256:])
    assert not last[44:].any()


def test_transformer_engine_names_mean_the_same():
    shape = SHAPES["qwen2"]
    local = mapping.find(shape, "decoder.layers.1.input_layernorm.weight")
    assert mapping.find(shape, "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight") == local
    assert mapping.find(shape, "decoder.layers.0.mlp.linear_fc1.layer_norm_weight").hf == (
        "model.layers.0.post_attention_layernorm.weight",
    )


def test_a_name_outside_the_table_is_an_error():
    with pytest.raises(mapping.UnknownParameterError, match="qwen3 table names no .*linear_qkv.bias"):
        mapping.find(SHAPES["qwen3"], "decoder.layers.0.self_attention.linear_qkv.bias")
