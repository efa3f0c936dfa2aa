"""A model folder's tokenizer: what is missing is named before anything is sampled with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_rlvr.config import ConfigError
from megatron_rlvr.tokenizer import load_tokenizer
from tests.tiny import make_folder


def test_whole_empty_broken_and_absent_ones(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", family="qwen2")
    with pytest.raises(ConfigError, match=r"model holds no vocabulary, .*: copy the model's tokenizer.json"):
        load_tokenizer(folder)  # transformers makes an empty one of this family
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x", "eos_token": "<end>"}))
    with pytest.raises(ConfigError, match="holds no vocabulary"):
        load_tokenizer(folder)
    whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"1": 0, "+": 1}, merges=[])))
    whole.save_pretrained(folder)
    assert load_tokenizer(folder)("1+1")["input_ids"] == [0, 1, 0]
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    with pytest.raises(ConfigError, match=r"model: its tokenizer cannot be read \(.*\): copy"):
        load_tokenizer(folder)
