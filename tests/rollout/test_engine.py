"""Prompts that come twice, end tokens, and the count of responses: what needs no engine."""

from __future__ import annotations

import json
import threading

import pytest

from megatron_rlvr.config import ConfigError
from megatron_rlvr.rollout.collect import earlier_appearances
from megatron_rlvr.rollout.engine import stop_token_ids
from megatron_rlvr.rollout.vllm_settings import _counting_bar
from megatron_rlvr.types import Prompt


def test_a_prompt_that_comes_twice_in_a_step_is_not_sampled_twice_alike():
    prompts = [Prompt(name, "", (1,), "math", 0) for name in "abaca"]
    assert earlier_appearances(prompts) == [0, 0, 1, 0, 2]


def test_the_bar_that_counts_shows_nothing_and_starts_no_thread_that_a_fork_would_inherit(capfd):
    ended, before = [], threading.active_count()
    bar = _counting_bar(ended.append)
    assert list(bar([3, 4], desc="Adding requests")) == [3, 4]  # as vLLM uses it: first it walks, then it counts
    with bar(total=5, desc="Processed prompts") as counter:
        counter.update(2)
        counter.update()
        assert counter.format_dict["elapsed"] >= 0
    assert ended == [2, 1] and threading.active_count() == before
    assert capfd.readouterr() == ("", "")


def test_stop_tokens_come_from_every_place_that_names_them(tmp_path):
    def write(name, tree):
        (tmp_path / name).write_text(json.dumps(tree))

    with pytest.raises(ConfigError, match="names no end token .*: set eos_token_id"):
        stop_token_ids(tmp_path)
    write("config.json", {"eos_token_id": 7, "vocab_size": 10})
    assert stop_token_ids(tmp_path) == [7]
    write("generation_config.json", {"eos_token_id": [5, 9]})
    assert stop_token_ids(tmp_path) == [5, 9]
    write("tokenizer_config.json", {"eos_token": {"content": "<end>"}})
    write("tokenizer.json", {"added_tokens": [{"id": 2, "content": "<end>"}, {"id": 3, "content": "<other>"}]})
    assert stop_token_ids(tmp_path) == [2, 5, 9]
    write("config.json", {"vocab_size": 6})
    assert stop_token_ids(tmp_path) == [2, 5]  # what the model cannot say ends nothing
    write("config.json", {"vocab_size": 2})
    with pytest.raises(ConfigError, match="names no end token below vocab_size=2"):
        stop_token_ids(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ')
    with pytest.raises(ConfigError, match=r"generation_config.json is not valid JSON"):
        stop_token_ids(tmp_path)
