"""The benchmarks that are known by name: where their problems come from, and which verifier judges the answers.

benchmark = find("aime24")
prompts = read(benchmark, "/data/eval", data, tokenizer)

Every layout that these files come in is one that prompt_rows.py recognises.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rlvr.config import ConfigError, DataConfig, SourceConfig, rule
from megatron_rlvr.prompt_report import unusable
from megatron_rlvr.prompts import PromptSet, load_prompts
from megatron_rlvr.types import Prompt
from megatron_rlvr.verifiers import own_files


@dataclass(frozen=True)
class Benchmark:
    """A set of problems that models are compared on."""

    name: str
    title: str
    file: str  # in a data folder; "": from the hub alone
    hub: str
    verifier: str = "math"
    shown: bool = True  # False: its authors ask that its texts are not shown, so no sample holds any
    prompt_field: str = ""  # of a file of your own; empty: detected
    answer_field: str = ""


BENCHMARKS = {
    item.name: item
    for item in (
        Benchmark("aime24", "AIME 2024", "aime24.jsonl", "hub:HuggingFaceH4/aime_2024"),
        Benchmark("aime25", "AIME 2025", "aime25.jsonl", "hub:math-ai/aime25@test"),
        Benchmark("amc23", "AMC 2023", "amc23.jsonl", "hub:math-ai/amc23@test"),
        Benchmark("math500", "MATH-500", "math500.jsonl", "hub:HuggingFaceH4/MATH-500@test"),
        Benchmark(
            "olympiadbench", "OlympiadBench", "olympiadbench.jsonl", "hub:Hothan/OlympiadBench/OE_TO_maths_en_COMP"
        ),
        Benchmark("minerva", "Minerva Math", "minerva.jsonl", "hub:math-ai/minervamath@test"),
        Benchmark("gsm8k", "GSM8K", "gsm8k_test.jsonl", "hub:openai/gsm8k/main@test"),
        Benchmark("gpqa", "GPQA Diamond", "", "hub:Idavidrein/gpqa/gpqa_diamond", verifier="choice", shown=False),
    )
}


def find(name: str, verifier: str = "math", prompt_field: str = "", answer_field: str = "") -> Benchmark:
    """The benchmark called ``name``, or the file of your own problems at that path, which the other arguments are for.

    Raises ConfigError: neither (with the closest name).
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    path = Path(name)
    if path.exists():
        own = Benchmark(path.name.partition(".")[0], path.name, str(path.resolve()), "", verifier)
        return replace(own, prompt_field=prompt_field, answer_field=answer_field)
    closest = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"unknown benchmark {name!r}; did you mean {closest!r}? There are {', '.join(BENCHMARKS)}, or give the path of "
        f"a file of problems"
    )


def source(benchmark: Benchmark, folder: str) -> SourceConfig:
    """Its file in ``folder``, or its hub name where none is given. Raises ConfigError: the folder lacks the file."""
    named = SourceConfig(prompt_field=benchmark.prompt_field, answer_field=benchmark.answer_field)
    if not folder or not benchmark.file:
        return replace(named, path=benchmark.hub or benchmark.file)
    path = Path(folder, benchmark.file)  # an absolute file stays as it is
    rule(
        path.exists(),
        f"{benchmark.title}: {folder} holds no {benchmark.file}; name another folder, or none to take {benchmark.hub}",
    )
    return replace(named, path=str(path))


def flag(benchmark: Benchmark, name: str) -> str:
    """What the user of a tool sets for prompt_field, answer_field or template, as errors name it."""
    text = f"--{name.replace('_', '-')}"
    if benchmark.hub and name.endswith("field"):
        return f"{text}, which is for files of your own: name the file by its path, not as {benchmark.name}"
    return text


def read(benchmark: Benchmark, folder: str, data: DataConfig, tokenizer: Any) -> PromptSet:
    """Its problems, each once, with ids NAME/ROW. Errors name the flags of tools/evaluate.py.

    Raises ConfigError: what load_prompts raises, and a problem that cannot be used, for without it the figures would be
    those of another benchmark.
    """
    key = partial(flag, benchmark)
    prompts = load_prompts([source(benchmark, folder)], replace(data, strict=False), tokenizer, benchmark.verifier, key)
    if lost := unusable(prompts.drops):
        raise ConfigError(f"{lost[0]}; mend it, or take it out and name the file by its path: a benchmark is whole")
    renamed = [replace(item, id=f"{benchmark.name}/{item.id.rpartition('/')[2]}") for item in prompts.prompts]
    return replace(prompts, prompts=renamed)


def digest(benchmark: Benchmark, prompts: Sequence[Prompt]) -> str:
    """Of the problems as they are asked, their answers and who judges: what samples under one name must share."""
    rows = [[prompt.id, prompt.token_ids, prompt.answer] for prompt in prompts]
    own = [file.read_text() for file in own_files(benchmark.verifier)]
    text = json.dumps([benchmark.verifier, rows, *own], default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
