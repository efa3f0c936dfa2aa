"""The countdown example's data, tokenizer and configuration; its runs are tested in tests/integration."""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import SourceConfig, load_config
from megatron_rlvr.exploration.base import build
from megatron_rlvr.prompts import load_prompts
from megatron_rlvr.rollout.engine import stop_token_ids
from megatron_rlvr.verifiers import countdown

EXAMPLE = Path(__file__).parents[1] / "examples/countdown_cpu"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the example's folder, imported as its script imports it."""
    monkeypatch.syspath_prepend(EXAMPLE)
    return importlib.import_module(name)


@pytest.fixture
def puzzles(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("puzzles", monkeypatch)


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("prepare", monkeypatch)


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("tiny_model", monkeypatch)


def test_puzzles_are_all_there_with_all_their_answers(puzzles: ModuleType) -> None:
    """Against an enumeration of its own: every expression over ordered numbers, evaluated by Python."""
    expected = defaultdict(set)
    for a, first, b, second, c in product("123456789", "+-*", "123456789", "+-*", "123456789"):
        expression = a + first + b + second + c
        target = eval(expression)
        if target >= 1:
            expected[tuple(sorted(map(int, (a, b, c)))), target].add(expression)
    found = {(puzzle.numbers, puzzle.target): set(puzzle.answers) for puzzle in puzzles.all_puzzles()}
    assert found == expected
    assert len(found) == 1386
    assert sum(map(len, found.values())) / len(found) == pytest.approx(3.55, abs=0.005)


def test_every_answer_is_right_to_the_verifier(puzzles: ModuleType) -> None:
    for puzzle in puzzles.all_puzzles():
        answer = countdown.read_answer(puzzle.row()["answer"])
        assert all(countdown.verify(text, answer).reward == 1.0 for text in puzzle.answers)
        assert countdown.verify(str(puzzle.target), answer).reward == 0.0


def test_a_hundred_puzzles_are_held_out_the_same_ones_every_time(puzzles: ModuleType, prepare: ModuleType) -> None:
    everything = puzzles.all_puzzles()
    train, held_out = prepare.split(everything)
    assert (len(train), len(held_out)) == (1286, 100)
    assert {puzzle.prompt for puzzle in train + held_out} == {puzzle.prompt for puzzle in everything}
    assert prepare.split(everything) == (train, held_out)


def test_a_build_that_is_there_is_kept(prepare: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text("kept")
    (tmp_path / "model").mkdir()
    monkeypatch.setattr("sys.argv", ["prepare.py", "--out", str(tmp_path)])
    assert prepare.main() == 0
    assert "already" in capsys.readouterr().out
    assert (tmp_path / "train.jsonl").read_text() == "kept"


def test_tokenizer_is_one_token_per_character_and_back(tiny_model: ModuleType, puzzles: ModuleType) -> None:
    tokenizer = tiny_model.tokenizer()
    assert len(tokenizer) == len(tiny_model.TOKENS) == 19
    for puzzle in puzzles.all_puzzles():
        for text in (puzzle.prompt, *puzzle.answers):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(ids) == len(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
    assert tokenizer.encode("38" + tokenizer.eos_token) == [3, 8, tokenizer.eos_token_id]
    assert tokenizer.encode("?") == [tokenizer.unk_token_id]


def test_the_random_model_loads_and_every_token_has_an_embedding(tiny_model: ModuleType, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_model.write(tmp_path / "a", seed=0)
    tiny_model.write(tmp_path / "b", seed=0)
    tiny_model.write(tmp_path / "c", seed=1)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert 0.6e6 < sum(parameter.numel() for parameter in model.parameters()) < 2e6
    assert model.model.embed_tokens.weight.norm(dim=1).min() > 0.1  # a zero row would make its RMSNorm blow up
    assert AutoTokenizer.from_pretrained(tmp_path / "a").encode("3,5=8>") == tiny_model.tokenizer().encode("3,5=8>")
    assert stop_token_ids(tmp_path / "a") == [tiny_model.TOKENS.index(tiny_model.END)]


@pytest.mark.parametrize("name", ["config", "ppo"])
def test_config_fits_the_model_and_the_puzzles(
    name: str, tiny_model: ModuleType, puzzles: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLE.parents[1])
    config = load_config(f"examples/countdown_cpu/{name}.yaml")
    assert Path(config.prepare).is_file()
    build(config.exploration, config)
    tiny_model.write(tmp_path / "model", seed=0)
    architecture = Architecture.from_folder(tmp_path / "model")
    for tp, pp in ((1, 1), (2, 1), (2, 2)):
        architecture.check_layout(tp, pp, 1)
        architecture.check_engine_layout(tp)
    architecture.check_length(config.longest)
    everything = puzzles.all_puzzles()
    longest = max(len(answer) for puzzle in everything for answer in puzzle.answers)
    assert longest + 1 <= config.rollout.max_response_length  # and the end token
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(puzzle.row()) + "\n" for puzzle in everything))
    config.data.strict = True
    prompts = load_prompts([SourceConfig(str(data))], config.data, tiny_model.tokenizer(), config.verifier)
    assert len(prompts) == len(everything)
