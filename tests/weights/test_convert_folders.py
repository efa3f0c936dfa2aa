"""Conversion where something is in the way: damaged sources, interruptions, a critic's head, and how much memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rlvr import platform
from megatron_rlvr.config import Config, ConfigError, CriticConfig, ModelConfig
from megatron_rlvr.models.build import initialize_parallel
from megatron_rlvr.models.critic import Critic
from megatron_rlvr.weights import convert_export, convert_import
from megatron_rlvr.weights.convert_export import export_megatron
from megatron_rlvr.weights.convert_import import import_hf
from megatron_rlvr.weights.convert_verify import describe, differing_tensors, report
from megatron_rlvr.weights.partial_folder import PartialFolder, fingerprint
from megatron_rlvr.weights.sources import VALUE_HEAD
from tests.ranks import run_ranks
from tests.weights.tiny_models import save_model

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, str(ROOT / "tools/convert_hf.py")]


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def same_files(one: Path, other: Path, but: tuple[str, ...] = ()) -> bool:
    names = {file.name for file in one.iterdir()} - set(but)
    return names == {file.name for file in other.iterdir()} - set(but) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


@pytest.mark.parametrize("tied", [True, False])
def test_bf16_survives_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    """NaN payloads, infinities, both zeros and denormals too: every 16-bit pattern is in the embedding."""
    source = tmp_path / "hf"
    save_model(source, "qwen3", tied, vocab_size=1100)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})
        embedding = tensors["model.embed_tokens.weight"].flatten()
        embedding[:] = every[torch.arange(len(embedding)) * 7919 % len(every)]
        tensors["model.embed_tokens.weight"] = embedding.view(-1, 64)

    rewrite(source / "model.safetensors", halve)
    import_hf(source, tmp_path / "megatron", tp=2, pp=2)
    export_megatron(tmp_path / "megatron", tmp_path / "back")
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", source))
    assert len({file.stat().st_mode for file in (tmp_path / "back").iterdir()}) == 1  # no file is its owner's alone
    assert found.keys() == expected.keys()
    assert all(found[name].view(torch.int16).equal(expected[name].view(torch.int16)) for name in expected)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    about = describe(tmp_path / "megatron")
    assert (about["format"], about["padded_vocab"], about["dtypes"]) == ("megatron", 1280, ["bfloat16"])
    assert describe(source)["parameters"] == about["parameters"] == sum(map(torch.numel, expected.values()))


def test_every_damage_is_one_error_and_nothing_is_written(tmp_path: Path) -> None:
    source, name = tmp_path / "hf", "model.layers.2.mlp.up_proj.weight"
    norm = "model.layers.3.input_layernorm.weight"
    save_model(source, "llama", tied=False, shard="150KB")
    located = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    file = located[name]

    def index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
        def edit(folder: Path) -> None:
            tree = json.loads((folder / "model.safetensors.index.json").read_text())
            change(tree["weight_map"])
            (folder / "model.safetensors.index.json").write_text(json.dumps(tree))

        return edit

    cut = (source / file).stat().st_size - 9
    damages: dict[str, Callable[[Path], object]] = {
        f"{file}, wanted for tensor .*, cannot be read": lambda at: os.truncate(at / file, cut),
        f"{file}.*cannot be read": lambda at: (at / file).unlink(),
        f"{file}: tensor {name} is missing": lambda at: rewrite(at / file, lambda held: held.pop(name)),
        f"{file}: tensor {name} has shape .95, 64.": lambda at: rewrite(
            at / file, lambda held: held.update({name: held[name][1:].clone()})
        ),
        f"tensor {name} is missing": index(lambda located: located.pop(name)),
        "tensor model.layers.7.bias is not part": index(lambda located: located.update({"model.layers.7.bias": file})),
        "is no file of this folder": index(lambda located: located.update({name: "../" + file})),
        "model-00099-of-00099.safetensors is not named": lambda at: shutil.copy(
            at / file, at / "model-00099-of-00099.safetensors"
        ),
        "model.safetensors, and model.safetensors.index.json, which does not name it": lambda at: shutil.copy(
            at / file, at / "model.safetensors"
        ),
        "broken.*merges.txt cannot be read: No such file": lambda at: (at / "merges.txt").symlink_to("gone"),
        "is no index of safetensors": lambda at: (at / "model.safetensors.index.json").write_text("{}"),
        "is torch.float16, in an earlier layer torch.float32": lambda at: rewrite(
            at / located[norm], lambda held: held.update({norm: held[norm].half()})
        ),
        "differ in dtype": lambda at: rewrite(at / file, lambda held: held.update({name: held[name].half()})),
    }
    for number, (message, damage) in enumerate(damages.items()):
        broken = tmp_path / "broken" / str(number)
        shutil.copytree(source, broken)
        damage(broken)
        with pytest.raises(ConfigError, match=message):
            import_hf(broken, tmp_path / "megatron")
        assert not (tmp_path / "megatron").exists()
    for layout, message in (({"tp": 3}, "tp=3 must divide"), ({"pp": 3}, "pp=3 must divide")):
        with pytest.raises(ConfigError, match=message):
            import_hf(source, tmp_path / "megatron", **layout)


def test_damaged_megatron_folders_are_named(tmp_path: Path) -> None:
    source, whole = tmp_path / "hf", tmp_path / "megatron"
    save_model(source, "qwen3_moe", tied=True)
    import_hf(source, whole)
    config = json.loads((whole / "config.json").read_text())

    def reshape(at: Path) -> None:
        (at / "config.json").write_text(json.dumps(config | {"intermediate_size": 96, "moe_intermediate_size": 24}))

    def other_depth(at: Path) -> None:
        (at / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))

    def more_words(at: Path) -> None:
        (at / "config.json").write_text(json.dumps(config | {"vocab_size": 9999}))

    def without_norms(at: Path) -> None:
        shutil.rmtree(at)
        save_model(tmp_path / "dense", "qwen3", tied=False)
        import_hf(tmp_path / "dense", at)
        dense = json.loads((at / "config.json").read_text())
        (at / "config.json").write_text(json.dumps(dense | {"model_type": "llama"}))

    damages: dict[str, Callable[[Path], object]] = {
        r"__0_0.distcp is cut short": lambda at: os.truncate(at / "__0_0.distcp", 9999),
        r"__0_0.distcp is missing": lambda at: (at / "__0_0.distcp").unlink(),
        "experts.linear_fc1.weight has shape .* config.json asks for .4, 4, 48, 64.": reshape,
        "has shape .4, .* config.json asks for .3, ": other_depth,
        "embedding.word_embeddings.weight has shape .*, config.json asks for .9999, 64. or more rows": more_words,
        "tensor decoder.layers.self_attention.[qk]_layernorm.weight is not part of the model": without_norms,
        "holds no .metadata": lambda at: (at / ".metadata").unlink(),
    }
    for number, (message, damage) in enumerate(damages.items()):
        broken = tmp_path / "broken" / str(number)
        shutil.copytree(whole, broken)
        damage(broken)
        with pytest.raises(ConfigError, match=message):
            export_megatron(broken, tmp_path / "back")
        assert not (tmp_path / "back").exists()


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at every file in turn: nothing has the target's name before the end, and no file is written twice."""
    monkeypatch.setattr(convert_import, "FILE_BYTES", 100_000)
    monkeypatch.setattr(convert_export, "SHARD_BYTES", 100_000)
    source = tmp_path / "hf"
    save_model(source, "qwen3", tied=False)
    import_hf(source, tmp_path / "at-once")
    export_megatron(tmp_path / "at-once", tmp_path / "back")

    def stopped(convert: Callable[..., None], *folders: Path) -> int:
        stops = [0, 0]

        def stop(done: int, total: int) -> None:
            if done > stops[1]:
                stops[:] = [stops[0] + 1, done]
                raise KeyboardInterrupt

        while True:
            try:
                convert(*folders, advance=stop)
                return stops[0]
            except KeyboardInterrupt:
                assert not folders[1].exists()

    assert stopped(import_hf, source, tmp_path / "in-parts") > 4
    assert same_files(tmp_path / "at-once", tmp_path / "in-parts")
    assert stopped(export_megatron, tmp_path / "in-parts", tmp_path / "back-in-parts") > 4
    assert same_files(tmp_path / "back", tmp_path / "back-in-parts")
    assert not differing_tensors(tmp_path / "back", source)

    with pytest.raises(ConfigError, match="at-once exists already"):
        import_hf(source, tmp_path / "at-once")
    with pytest.raises(KeyboardInterrupt):
        import_hf(source, tmp_path / "changed", advance=lambda done, total: (_ for _ in ()).throw(KeyboardInterrupt))
    norm = "model.norm.weight"
    rewrite(source / "model.safetensors", lambda held: held.update({norm: held[norm] + 1}))
    import_hf(source, tmp_path / "changed")  # what was finished is of another model, and is not kept
    assert not differing_tensors(source, tmp_path / "changed")
    assert differing_tensors(source, tmp_path / "at-once") == [f"{norm}: 64 of 64 values"]


def test_only_what_was_finished_of_the_very_same_task_is_kept(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", "notes.md"):
        (tmp_path / "source" / name).write_text("{}")

    def folder() -> PartialFolder:
        return PartialFolder(tmp_path / "target", {"from": fingerprint(tmp_path / "source", ["config.json"])})

    folder().write("weights", lambda file: file.write_text("x"))
    assert folder().has("weights")
    os.utime(tmp_path / "source/config.json", (0, 0))  # of the same size, written anew
    assert not folder().has("weights")
    folder().write("weights", lambda file: file.write_text("y"))
    folder().copy_companions(tmp_path / "source", "float32")
    folder().finish()
    assert sorted(file.name for file in (tmp_path / "target").iterdir()) == ["config.json", "tokenizer.json", "weights"]


def test_a_critics_head_travels_along(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    save_model(source, "qwen3", tied=True)
    head = {"weight": torch.randn(3, 64), "bias": torch.randn(3)}
    save_file(head, source / VALUE_HEAD)
    import_hf(source, tmp_path / "megatron", tp=2)
    assert describe(tmp_path / "megatron")["holds"] == "a critic of 3 heads"
    export_megatron(tmp_path / "megatron", tmp_path / "back")
    found = load_file(tmp_path / "back" / VALUE_HEAD)
    assert found.keys() == head.keys() and all(found[leaf].equal(head[leaf]) for leaf in head)
    assert not differing_tensors(source, tmp_path / "megatron")
    assert not differing_tensors(tmp_path / "back", tmp_path / "megatron")
    assert report(tmp_path / "back", tmp_path / "megatron", tensors_only=False) == 0  # a critic has no logits


def head_of_a_critic(path: Path, heads: int) -> dict[str, torch.Tensor] | str:
    config = Config(model=ModelConfig(str(path), dtype="float32"), critic=CriticConfig(num_heads=heads))
    platform.start_rank()
    try:
        chunk = Critic(config, initialize_parallel(config)).chunks[0]
    except ConfigError as error:
        return str(error)
    return {leaf: getattr(chunk.output_layer, leaf).detach().numpy() for leaf in ("weight", "bias")}


@pytest.mark.parametrize("heads", [3, 2])
def test_a_critic_starts_from_a_critics_folder(tmp_path: Path, heads: int) -> None:
    save_model(tmp_path / "hf", "qwen3", tied=True)
    head = {"weight": torch.randn(3, 64), "bias": torch.randn(3)}
    save_file(head, tmp_path / "hf" / VALUE_HEAD)
    import_hf(tmp_path / "hf", tmp_path / "megatron")
    for folder in (tmp_path / "hf", tmp_path / "megatron"):
        (found,) = run_ranks(1, head_of_a_critic, folder, heads)
        if heads == 3:
            assert all(torch.from_numpy(found[leaf]).equal(head[leaf]) for leaf in head)
        else:
            assert "output_layer.weight has shape [3, 64], critic.num_heads asks for [2, 64]" in found


def test_what_is_asked_for_and_not_there_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "qwen3", tied=True)
    step, back = tmp_path / "step_3", tmp_path / "back"
    import_hf(tmp_path / "hf", step / "policy")
    with pytest.raises(ConfigError, match="step_3' is a checkpoint without critic: it holds policy, which --model"):
        export_megatron(step, back, "critic")
    with pytest.raises(ConfigError, match="policy' is a language model: drop --model=critic"):
        export_megatron(step / "policy", back, "critic")
    with pytest.raises(ConfigError, match="is no Megatron folder: it holds no .metadata"):
        export_megatron(tmp_path, back)
    for layout in ({"tp": 0}, {"pp": -1}):
        ((name, size),) = layout.items()
        with pytest.raises(ConfigError, match=f"--{name} must be at least 1, not {size}"):
            import_hf(tmp_path / "hf", back, **layout)
    for place in (tmp_path / "hf" / "config.json" / "inside", Path("/proc/inside")):
        with pytest.raises(ConfigError, match="cannot make .*inside.partial: .*; give a place that can be written"):
            export_megatron(step, place)
    assert not back.exists()


def test_a_mistake_of_ours_is_not_called_a_full_disk(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        PartialFolder(tmp_path / "target", {}).write("one", fails)


def test_a_tied_model_may_carry_its_head_as_long_as_it_is_the_embedding(tmp_path: Path) -> None:
    source, head = tmp_path / "hf", "lm_head.weight"
    save_model(source, "qwen3", tied=True)
    file = source / "model.safetensors"
    rewrite(file, lambda held: held.update({head: held["model.embed_tokens.weight"].clone()}))
    import_hf(source, tmp_path / "one")
    rewrite(file, lambda held: held[head][5].mul_(2))
    with pytest.raises(
        ConfigError, match=f"config.json ties {head} to model.embed_tokens.weight, but they differ: set"
    ):
        import_hf(source, tmp_path / "two")


def test_what_a_model_needs_beside_its_weights_travels_along(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    save_model(source, "qwen3", tied=True)
    (source / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (source / name).write_text(f"{{# {name} #}}")
    (source / "notes.json").mkdir()  # a folder of that name is nothing of a model's
    import_hf(source, tmp_path / "megatron")
    export_megatron(tmp_path / "megatron", tmp_path / "back")
    assert (tmp_path / "back/additional_chat_templates/tool_use.jinja").read_text().startswith("{# additional")
    assert (tmp_path / "back/chat_template.jinja").exists() and not (tmp_path / "back/notes.json").exists()


def test_torchs_own_words_for_a_full_disk_are_known(tmp_path: Path) -> None:
    partial = PartialFolder(tmp_path / "target", {})
    with no_file_above(1_000), pytest.raises(ConfigError, match="could not be written.*make room"):
        partial.write("small", lambda path: torch.save({}, path))
    assert not list(partial.path.glob("small*"))
    partial.write("small", lambda path: torch.save({}, path))


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """As on a full disk, a write fails in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_is_one_error_and_the_same_command_goes_on(tmp_path: Path) -> None:
    source, megatron, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    save_model(source, "llama", tied=True)
    for convert, folders, file in (
        (import_hf, (source, megatron), "megatron.partial/__0_0.distcp"),
        (export_megatron, (megatron, back), "back.partial/model.safetensors"),
    ):
        with no_file_above(50_000), pytest.raises(ConfigError) as error:
            convert(*folders)
        assert f"{file}.unfinished could not be written: " in str(error.value) and "File too large" in str(error.value)
        assert "MiB are free: make room, and the same command goes on where it stopped" in str(error.value)
        assert not folders[1].exists() and not list(tmp_path.glob("*.partial/*.unfinished"))
        convert(*folders)
    assert not differing_tensors(source, back)


def test_the_tool_converts_verifies_and_says_what_is_wrong(tmp_path: Path) -> None:
    def tool(*arguments: object) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=200, env=environment
        )

    source, megatron = tmp_path / "hf", tmp_path / "RUN" / "checkpoints" / "step_3"
    save_model(source, "llama", tied=True)
    assert tool("import", "--hf", source, "--megatron", megatron / "policy", "--tp", 2).returncode == 0
    done = tool("verify", "--hf", source, "--megatron", megatron)
    assert done.returncode == 0, done.stderr
    assert "every tensor is bit for bit the same" in done.stdout and "logits differ by up to" in done.stdout
    done = tool("export", "--hf", source, "--megatron", megatron)
    assert done.returncode == 1 and done.stderr.strip().startswith(f"error: {source} exists already")
    assert "Traceback" not in done.stderr
