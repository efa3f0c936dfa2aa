"""What a model is built with: logits or none (that it may do without is in test_invariance.py), and which kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core.models.common.embeddings import rope_utils

from megatron_rlvr import platform
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.models.build import transformer_config
from tests.tiny import make_config, make_folder


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return Architecture.from_folder(make_folder(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(
    ("tokens", "vocab", "tp", "dtype", "fused"),
    [
        (8192, 4096, 1, "float32", False),  # 128 MiB
        (8192, 151_936, 1, "bfloat16", True),  # 2.3 GiB
        (8192, 151_936, 4, "bfloat16", False),  # a quarter of it on each rank
        (8192, 151_936, 4, "float32", True),  # twice that
        (32_768, 152_064, 8, "bfloat16", True),  # Qwen2.5-32B: 1.16 GiB
    ],
)
def test_logits_are_left_out_where_they_would_take_more_than_a_gib(
    architecture: Architecture, tokens: int, vocab: int, tp: int, dtype: str, fused: bool
) -> None:
    large = replace(architecture, vocab_size=vocab)
    tree = {"model": {"dtype": dtype}, "parallel": {"tp": tp}, "trainer": {"microbatch_tokens": tokens}}
    form = "fused" if fused else "materialised"
    assert large.logits_form(make_config(Path("unused"), tree)) == form
    several, dropout = {"microbatch_tokens": tokens, "updates_per_rollout": 2}, {"dtype": dtype, "dropout": 0.1}
    for section, settings in (("trainer", several), ("model", dropout)):
        of_older = make_config(Path("unused"), tree | {section: settings})
        assert large.logits_form(of_older) == ("fused_float32" if dtype == "bfloat16" else form)
    for logits in ("materialised", "fused", "fused_float32"):
        tree["model"]["logits"] = logits
        assert large.logits_form(make_config(Path("unused"), tree)) == logits


@pytest.mark.parametrize("transformer_engine", [False, True])
@pytest.mark.parametrize("apex", [False, True])
def test_weight_gradients_are_fused_where_apex_is_there(
    architecture: Architecture, apex: bool, transformer_engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron refuses to build its own output layer with the fusion and no apex, whatever the other layers are."""
    monkeypatch.setattr(platform, "has_apex_weight_gradient_kernel", lambda: apex)
    monkeypatch.setattr(platform, "has_transformer_engine", lambda: transformer_engine)
    for kernel in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
        monkeypatch.setattr(rope_utils, kernel, object())  # Transformer Engine's
    assert transformer_config(make_config(Path("unused")), architecture).gradient_accumulation_fusion == apex
