"""Folders written and read back, and every broken folder refused with the file and the tensor named."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_rlvr.config import ConfigError
from megatron_rlvr.weights.convert import save_hf
from megatron_rlvr.weights.partial_folder import companions
from megatron_rlvr.weights.sources import Checkpoint
from tests.weights.tiny_models import save_model, weights_of


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "source"
    return folder, save_model(folder, "qwen3", tied=True)


def shapes(model) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in weights_of(model).items()}


@pytest.mark.parametrize(("shard_bytes", "shards"), [(4 << 30, 1), (250_000, 3)])
def test_saved_folder_loads_in_transformers(saved, tmp_path, shard_bytes, shards):
    source, model = saved
    target = tmp_path / "run" / "hf"
    target.mkdir(parents=True)
    (target / "left-over").write_text("of an earlier run")
    weights = weights_of(model)
    save_hf(iter(weights.items()), companions(source), target, shard_bytes)
    assert not (target / "left-over").exists()
    assert not target.with_name("hf.partial").exists()
    assert (target / "tokenizer_config.json").exists()
    files = sorted(file.name for file in target.glob("*.safetensors"))
    assert files[0] == ("model.safetensors" if shards == 1 else f"model-00001-of-{shards:05}.safetensors")
    assert len(files) == shards
    assert {(target / file).stat().st_mode & 0o077 for file in files} == {target.stat().st_mode & 0o066}  # others
    loaded = transformers.AutoModelForCausalLM.from_pretrained(target).eval()
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_saved_dtype_is_in_the_config(saved, tmp_path):
    source, model = saved
    halves = {name: tensor.bfloat16() for name, tensor in weights_of(model).items()}
    save_hf(iter(halves.items()), companions(source), tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}


def test_sharded_folder_is_read_whole(tmp_path):
    model = save_model(tmp_path, "qwen2", tied=False, shard="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.check(shapes(model))
        assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in weights_of(model).items())


def test_missing_unknown_and_misshapen_tensors(saved):
    folder, model = saved
    file, wanted = folder / "model.safetensors", shapes(model)
    weights = load_file(file)
    norm = "model.layers.2.self_attn.q_norm.weight"
    broken = {
        f"tensor {norm} is missing": {name: tensor for name, tensor in weights.items() if name != norm},
        f"model.safetensors: tensor {norm} has shape .31., config.json asks for .32.": weights | {norm: torch.ones(31)},
        "model.safetensors: tensor model.layers.9.extra is not part of the model": weights
        | {"model.layers.9.extra": torch.ones(2)},
    }
    for message, tensors in broken.items():
        save_file(tensors, file)
        with pytest.raises(ConfigError, match=message), Checkpoint(folder) as checkpoint:
            checkpoint.check(wanted)


def test_truncated_files(saved, tmp_path):
    folder, model = saved
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        Checkpoint(folder)

    sharded = tmp_path / "sharded"
    save_model(sharded, "qwen3", tied=True, shard="100KB")
    located = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.3.mlp.up_proj.weight"
    shard = sharded / located[name]
    shard.write_bytes(shard.read_bytes()[:-8])
    with (
        pytest.raises(ConfigError, match=f"{shard.name}, wanted for tensor .*, cannot be read"),
        Checkpoint(sharded) as checkpoint,
    ):
        checkpoint.check(shapes(model))
    shard.unlink()
    with pytest.raises(ConfigError, match=f"{shard.name}, wanted for tensor"), Checkpoint(sharded) as checkpoint:
        checkpoint.check(shapes(model))


def test_folder_without_weights(tmp_path):
    with pytest.raises(ConfigError, match="holds neither model.safetensors nor"):
        Checkpoint(tmp_path)
