"""Random weights as a folder: the same for the same seed, whole, and what the architecture asks for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.weights.initial import write_initial
from megatron_rlvr.weights.mapping import hf_shapes
from tests.tiny import make_folder


def test_initial_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", family="qwen2")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tools.jinja").write_text("x")
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        write_initial(source, tmp_path / name, seed)
    first, again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again", "other"))
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == hf_shapes(Architecture.from_folder(source))
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name in first if first[name].dim() == 2]
    assert all(not torch.equal(first[name], other[name]) for name in matrices)
    assert abs(float(torch.cat([first[name].flatten() for name in matrices]).std()) - 0.02) < 1e-3
    assert all(bool((first[name] == 1).all()) for name in first if name.endswith("norm.weight"))
    assert all(bool((first[name] == 0).all()) for name in first if name.endswith(".bias"))
    first_config, config = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "first", source))
    assert first_config == config
    assert (tmp_path / "first/additional_chat_templates/tools.jinja").read_text() == "x"
    (source / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))
    write_initial(source, tmp_path / "first", 1)  # in the place of what lies there
    wide = load_file(tmp_path / "first/model.safetensors")
    assert all(torch.allclose(wide[name], 25 * first[name], rtol=1e-5) for name in matrices)
