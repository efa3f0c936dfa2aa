"""Two whole steps on DAPO-Math-17k with the math verifier: long prompts, Chinese, a byte-level tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.integration.conftest import metrics, rollouts
from tests.tiny import make_folder

LONGEST = 6000  # bytes: the data's longest prompt has 3,190 characters, partly of three bytes


def save_byte_tokenizer(folder: Path) -> None:
    """Every byte is a token: 256 of them in the byte-level alphabet's letters, and the end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


@pytest.mark.real_data
def test_two_steps_on_dapo(train, tmp_path: Path) -> None:
    model = make_folder(
        tmp_path / "model",
        vocab_size=257,
        num_hidden_layers=2,
        head_dim=32,
        max_position_embeddings=8192,
        eos_token_id=256,
    )
    save_byte_tokenizer(model)
    config = {
        "name": "dapo",
        "verifier": "math",
        "model": {"path": str(model), "dtype": "float32"},
        "parallel": {"tp": 2},
        "data": {
            "path": str(Path(os.environ["MEGATRON_RLVR_DATA"]) / "train" / "dapo_math_17k.parquet"),
            "template": "raw",
            "max_prompt_length": LONGEST,
        },
        "rollout": {"prompts_per_step": 4, "responses_per_prompt": 4, "max_response_length": 32, "kv_cache_mib": 128},
        "trainer": {"num_steps": 2, "microbatch_tokens": 16384, "log_rollouts": 16},
        "exploration": {"lp_reg": {"rho": 0.05}},
        "run": {"dir": str(tmp_path / "run")},
    }
    (tmp_path / "dapo.yaml").write_text(yaml.safe_dump(config))
    output = train(config=str(tmp_path / "dapo.yaml"))
    assert "17917" in output.replace(",", ""), output
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["sync/verified"] is True
        assert row["rollout/log_prob_gap_max"] < 1e-3  # a random model's distributions are peaked
        assert row["verifier/error_share"] == row["verifier/timeout_share"] == 0
        assert 0 <= row["reward/mean"] <= 1
    assert len(rollouts(tmp_path / "run")) == 32
