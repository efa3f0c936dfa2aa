"""Shapes read from config.json, and every shape that is refused."""

from __future__ import annotations

import json

import pytest

from megatron_rlvr.architecture import Architecture, Experts, RopeScaling
from megatron_rlvr.config import ConfigError

QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 300,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MIXTURE = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def read(tmp_path, **changes) -> Architecture:
    tree = {key: value for key, value in (QWEN3 | changes).items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    return Architecture.from_folder(tmp_path)


def test_reads_qwen3(tmp_path):
    assert read(tmp_path) == Architecture(
        family="qwen3", num_layers=4, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=32, ffn_size=96,
        vocab_size=300, tied=True, qk_norm=True, qkv_bias=False, rope_theta=1e6, rms_eps=1e-5, max_positions=512,
    )  # fmt: skip


def test_reads_qwen2_without_head_dim(tmp_path):
    shape = read(tmp_path, model_type="qwen2", head_dim=..., tie_word_embeddings=...)
    assert (shape.family, shape.head_dim, shape.qkv_bias, shape.qk_norm, shape.tied) == (
        "qwen2",
        16,
        True,
        False,
        False,
    )


def test_reads_llama_with_its_rope_scaling(tmp_path):
    shape = read(tmp_path, model_type="llama", rope_scaling=LLAMA3)
    assert shape.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192) and shape.rope_theta == 1e6
    assert not shape.qk_norm and not shape.qkv_bias
    new = read(tmp_path, model_type="llama", rope_theta=..., rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    assert new.rope_scaling == shape.rope_scaling and new.rope_theta == 5e5


def test_reads_a_mixture_of_experts_and_does_not_train_it(tmp_path):
    shape = read(tmp_path, **MIXTURE, norm_topk_prob=True)
    assert shape.experts == Experts(count=8, per_token=2, ffn_size=48, normalised=True)
    with pytest.raises(ConfigError, match="model.path: a qwen3_moe model is converted and evaluated here, but not"):
        shape.check_trains()
    assert read(tmp_path, **MIXTURE | {"num_experts": ..., "num_local_experts": 8}).experts.count == 8
    read(tmp_path).check_trains()


def test_rope_theta_in_either_place(tmp_path):
    new = read(tmp_path, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert new.rope_theta == 5e5
    assert read(tmp_path, rope_scaling={"type": "default"}).rope_theta == 1e6
    assert read(tmp_path, rope_theta=...).rope_theta == 1e4


def test_both_places_may_say_the_same_about_rope(tmp_path):
    rope = LLAMA3 | {"rope_theta": 5e5}
    plain = read(tmp_path, model_type="llama", rope_theta=..., rope_parameters=rope)
    for scaling in (rope, None, {}):
        tree = {"rope_theta": ..., "rope_parameters": rope, "rope_scaling": scaling}
        assert read(tmp_path, model_type="llama", **tree) == plain


@pytest.mark.parametrize("family", ["Qwen2Config", "Qwen3Config"])
def test_reads_what_transformers_writes(tmp_path, family):
    import transformers

    config = getattr(transformers, family)(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=300, rope_parameters={"rope_type": "default", "rope_theta": 12345.0}, max_position_embeddings=64,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    shape = Architecture.from_folder(tmp_path)
    assert (shape.rope_theta, shape.num_kv_heads, shape.tied, shape.max_positions) == (12345.0, 2, False, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is not supported; supported: qwen2, qwen3, llama, qwen3_moe"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "factor of the rope scaling must be a positive number, not '8'"),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, "factor of the rope scaling must be a positive number, not 0"),
        (MIXTURE | {"decoder_sparse_step": 2}, "dense layers among those with experts .* are not supported"),
        ({"head_dim": ...}, "head_dim must be a positive integer, not None"),
        ({"num_key_value_heads": ...}, "num_key_value_heads must be a positive integer, not None"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is not supported for llama"),
        (MIXTURE | {"mlp_only_layers": [1]}, "dense layers among those with experts .* are not supported"),
        (MIXTURE | {"num_experts": 0}, "num_experts must be a positive integer, not None"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": {"rope_type": "yarn"}},
            "rope_parameters .* and rope_scaling .*'yarn'.* differ: keep one of them",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope scaling 'linear' is not supported"),
        ({"use_sliding_window": True}, "sliding-window attention is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
        ({"attention_bias": True}, "attention_bias is not supported for qwen3"),
        ({"num_hidden_layers": ...}, "num_hidden_layers must be a positive integer, not None"),
        ({"num_key_value_heads": 3}, "3 key-value heads must divide the 4 attention heads"),
    ],
)
def test_refuses_by_name(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **changes)


def test_refuses_folders_without_a_config(tmp_path):
    with pytest.raises(ConfigError, match="model.path='.*/absent' is not a folder"):
        Architecture.from_folder(tmp_path / "absent")
    with pytest.raises(ConfigError, match="holds no config.json"):
        Architecture.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        Architecture.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ((3, 1, 1), "parallel.tp=3 must divide the model's 4 attention heads"),
        ((4, 1, 1), "parallel.tp=4 must divide the model's 2 key-value heads"),
        ((1, 3, 1), "parallel.pp=3 must divide the model's 4 layers"),
        ((1, 2, 4), r"parallel.pp=2 x parallel.vpp=4 = 8 stages must divide the model's 4 layers"),
        ((2, 1, 1, 4), "parallel.tp=2 x parallel.cp=4 must divide the model's 4 attention heads"),
    ],
)
def test_layouts_that_do_not_fit(tmp_path, layout, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path).check_layout(*layout)


def test_layouts_that_fit(tmp_path):
    shape = read(tmp_path)
    shape.check_layout(2, 2, 2, 2)
    shape.check_engine_layout(4)  # two ranks share each key-value head
    with pytest.raises(ConfigError, match="tp=3 .* must divide the model's 4 attention heads"):
        shape.check_engine_layout(3)
    with pytest.raises(ConfigError, match="= 513 tokens, but the model's positions end at 512"):
        shape.check_length(513)
    shape.check_length(512)
    experts = read(tmp_path, **MIXTURE | {"moe_intermediate_size": 7})  # theirs are cut, and not a dense layer's
    with pytest.raises(ConfigError, match="parallel.tp=2 must divide the model's 7 feed-forward columns"):
        experts.check_layout(2, 1, 1)


def test_padded_vocabulary(tmp_path):
    shape = read(tmp_path)
    assert [shape.padded_vocab(tp) for tp in (1, 2, 4)] == [384, 512, 512]
