"""The table of benchmarks: names, sources, and every published file read whole."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlvr import verifiers
from megatron_rlvr.benchmarks import BENCHMARKS, digest, find, read, source
from megatron_rlvr.config import ConfigError, DataConfig
from tests.test_prompts import Characters

RAW = DataConfig(template="raw", max_prompt_length=1 << 30)


def test_names_and_files_of_your_own(tmp_path: Path) -> None:
    assert find("aime24").title == "AIME 2024"
    own = tmp_path / "mine.jsonl"
    own.write_text(json.dumps({"problem": "1+1?", "answer": "2"}) + "\n")
    benchmark = find(str(own))
    assert (benchmark.name, benchmark.verifier) == ("mine", "math")
    for folder in ("", str(tmp_path), "/elsewhere"):
        (prompt,) = read(benchmark, folder, RAW, Characters()).prompts
        assert (prompt.id, prompt.answer) == ("mine/1", "2")
    with pytest.raises(ConfigError, match="unknown benchmark 'aime2'; did you mean 'aime2[45]'"):
        find("aime2")


def test_a_folder_or_the_hub(tmp_path: Path) -> None:
    (tmp_path / "amc23.jsonl").write_text("")
    assert source(find("amc23"), str(tmp_path)).path == str(tmp_path / "amc23.jsonl")
    assert source(find("amc23"), "").path == "hub:math-ai/amc23@test"
    with pytest.raises(
        ConfigError, match="AIME 2024: .* holds no aime24.jsonl; name another folder, or none to take hub:"
    ):
        source(find("aime24"), str(tmp_path))


def test_gpqa_comes_from_the_hub_alone_and_is_never_shown(tmp_path: Path) -> None:
    gpqa = find("gpqa")
    assert not gpqa.shown and source(gpqa, str(tmp_path)).path == "hub:Idavidrein/gpqa/gpqa_diamond"
    assert all(item.shown for item in BENCHMARKS.values() if item is not gpqa)


def test_a_problem_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "amc23.jsonl").write_text('{"problem": "1+1?", "answer": 2.0}\n{"problem": "x", "answer": null}\n')
    with pytest.raises(ConfigError, match="amc23.jsonl row 2, answer: no answer; mend it, or take it out") as raised:
        read(find("amc23"), str(tmp_path), RAW, Characters())
    assert "data." not in str(raised.value)


def test_samples_are_of_one_verifier_file_as_it_was(tmp_path: Path) -> None:
    rows, judge = tmp_path / "mine.jsonl", tmp_path / "judge.py"
    rows.write_text(json.dumps({"problem": "1+1?", "answer": "2"}) + "\n")
    judge.write_text("ISOLATED = False\nread_answer = str\nverify = None\n")
    found = []
    for verifier in (str(judge), f"0.5*{judge} + 0.5*math", "math"):
        benchmark = find(str(rows), verifier)
        prompts = read(benchmark, "", RAW, Characters()).prompts
        before = digest(benchmark, prompts)
        judge.write_text(judge.read_text() + "# other\n")
        found.append(digest(benchmark, prompts) == before)
    assert found == [False, False, True]


def test_samples_are_of_the_tokens_that_were_asked(tmp_path: Path) -> None:
    """A tokenizer that has changed asks something else in the same words."""
    rows = tmp_path / "mine.jsonl"
    rows.write_text(json.dumps({"problem": "1+1?", "answer": "2"}) + "\n")
    (prompt,) = read(find(str(rows)), "", RAW, Characters()).prompts
    before = digest(find(str(rows)), [prompt])
    for changed in ({"token_ids": (*prompt.token_ids, 9)}, {"answer": "3"}, {"id": "mine/2"}):
        assert digest(find(str(rows)), [replace(prompt, **changed)]) != before, changed


def test_fields_of_a_file_of_your_own_are_named_by_flags(tmp_path: Path) -> None:
    own = tmp_path / "amc23.jsonl"
    own.write_text(json.dumps({"task": "1+1?", "gold": "2"}) + "\n")
    for folder in ("", str(tmp_path)):
        (prompt,) = read(find(str(own), "math", "task", "gold"), folder, RAW, Characters()).prompts
        assert (prompt.text, prompt.answer) == ("1+1?", "2")
    with pytest.raises(ConfigError, match="no field prompt or .*, but task, gold: set --prompt-field$"):
        read(find(str(own)), "", RAW, Characters())
    with pytest.raises(ConfigError, match="set --answer-field$"):
        read(find(str(own), "math", "task"), "", RAW, Characters())
    with pytest.raises(ConfigError, match="set --prompt-field, which is for .* by its path, not as amc23$"):
        read(find("amc23", "math", "task", "gold"), str(tmp_path), RAW, Characters())
    with pytest.raises(ConfigError, match="^--template=chat needs .* set --template=raw"):
        read(find(str(own)), "", DataConfig(), Characters())


@pytest.mark.real_data
def test_every_published_file_is_read_whole() -> None:
    folder = os.environ["MEGATRON_RLVR_DATA"] + "/eval"
    sizes = {
        "aime24": 30,
        "aime25": 30,
        "amc23": 40,
        "math500": 500,
        "olympiadbench": 675,
        "minerva": 272,
        "gsm8k": 1319,
    }
    for name, size in sizes.items():
        prompts = read(BENCHMARKS[name], folder, RAW, Characters())
        assert [prompt.id for prompt in prompts.prompts] == [f"{name}/{row}" for row in range(1, size + 1)]
        assert verifiers.load(BENCHMARKS[name].verifier)
    assert {name for name, item in BENCHMARKS.items() if item.file} == set(sizes)
