"""The public shapes give the parameter counts that Hugging Face shows for the models' safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlvr.config import Config, ConfigError, ModelConfig
from megatron_rlvr.planner.shapes import SHAPES, NotMadeYet, find_architecture
from megatron_rlvr.planner.workload import whole_parameters

PUBLISHED = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B-Base": 596_049_920,
    "Qwen3-1.7B-Base": 1_720_574_976,
    "Qwen3-4B-Base": 4_022_468_096,
    "Qwen3-8B-Base": 8_190_735_360,
    "Qwen3-14B-Base": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters(name: str) -> None:
    assert whole_parameters(SHAPES[name]) == PUBLISHED[name]


def test_a_folders_own_config_comes_first(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen2.5-32B"
    folder.mkdir()
    tree = {"model_type": "qwen2", "num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2}
    tree["num_key_value_heads"] = 2
    tree |= {"intermediate_size": 96, "vocab_size": 211, "max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(tree))
    architecture, source = find_architecture(Config(), str(folder), "model.path")
    assert architecture.num_layers == 2 and source == f"{folder}/config.json"
    architecture, source = find_architecture(Config(), "/nowhere/Qwen2.5-32B", "model.path")
    assert architecture.num_layers == 64 and "public shape" in source


def test_what_is_unknown_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="critic.path='models/mine' is neither a folder"):
        find_architecture(Config(), "models/mine", "critic.path")
    config = Config(prepare="make.py", model=ModelConfig(path="not/there"))
    with pytest.raises(NotMadeYet, match=r"the run makes it with make\.py first"):
        find_architecture(config, config.model.path, "model.path")
