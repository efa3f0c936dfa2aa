"""A model folder's tokenizer, or what it lacks.

load_tokenizer("models/Qwen3-4B")("1+1")["input_ids"] -> [16, 10, 16]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rlvr.config import ConfigError, rule


def load_tokenizer(folder: str | Path) -> Any:
    """transformers' tokenizer of a model folder. Raises ConfigError: files that are absent, broken or without a token.

    transformers makes an empty tokenizer of some families where a folder has no vocabulary: every prompt of it would
    be the same few marks of the chat template.
    """
    from transformers import AutoTokenizer  # an import of seconds, which no earlier check waits for

    way_out = "copy the model's tokenizer.json (or vocab.json and merges.txt) and tokenizer_config.json there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the library below raises bare Exceptions for a file that it cannot read
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{folder}: its tokenizer cannot be read ({reason}): {way_out}") from error
    words = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    rule(bool(words), f"{folder} holds no vocabulary, so that every prompt would come to nothing: {way_out}")
    return tokenizer
