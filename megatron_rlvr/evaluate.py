"""A model on benchmarks: samples, verdicts, figures. tools/evaluate.py is the door.

Every sample depends on (seed, problem, sample index) alone, and is on disk before the next batch starts: an evaluation
that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.benchmarks import Benchmark, digest, find, read
from megatron_rlvr.config import rule
from megatron_rlvr.evaluation import Estimate, figures, mean
from megatron_rlvr.evaluation_critic import EvaluationCritic
from megatron_rlvr.evaluation_models import differences, find_critic, find_model, hugging_face, identity
from megatron_rlvr.evaluation_sampling import Job, sample
from megatron_rlvr.evaluation_settings import Settings
from megatron_rlvr.records import finite
from megatron_rlvr.rollout.engine import stop_token_ids
from megatron_rlvr.run_folder import hold
from megatron_rlvr.sample_store import SampleStore
from megatron_rlvr.tokenizer import load_tokenizer
from megatron_rlvr.types import Prompt


def evaluate(settings: Settings, console: Console) -> dict[str, Any]:
    """Sample and judge what is missing, write OUTPUT/results.json and print it as a table.

    Raises ConfigError: settings, a model, a benchmark or an output folder that cannot be used, or is in use;
    VerifierError: a verifier that fails on too many responses.
    """
    settings.check()
    own = settings.verifier, settings.prompt_field, settings.answer_field
    model, benchmarks = find_model(settings.model), [find(name, *own) for name in settings.benchmarks]
    names = [benchmark.name for benchmark in benchmarks]
    twice = next((name for name in names if names.count(name) > 1), None)
    rule(twice is None, f"two benchmarks are called {twice}, and their samples share a file: rename one, or drop it")
    critic = find_critic(settings.critic, model) if settings.critic else None
    tokenizer = load_tokenizer(model)
    for line in differences(settings):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    problems = [(item, _problems(item, settings, model, tokenizer, console)) for item in benchmarks]
    sampled = settings.identity() | {"model": identity(model), "critic": identity(critic) if critic else None}
    sampled["end_tokens"] = stop_token_ids(model)
    output = Path(settings.output)
    with hold(output, what="evaluation", key="--output"):
        store = SampleStore(output, sampled, {item.name: digest(item, prompts) for item, prompts in problems})
        _fill(store, problems, settings, model, critic, tokenizer, console)
        results = {item.name: _results(item, prompts, settings.samples, store) for item, prompts in problems}
        written = {"settings": sampled | {"samples": settings.samples}, "benchmarks": results}
        (output / "results.json").write_text(json.dumps(written, indent=1, allow_nan=False) + "\n")
    console.print(_table(results))
    return written


def _fill(
    store: SampleStore,
    problems: list[tuple[Benchmark, list[Prompt]]],
    settings: Settings,
    model: Path,
    critic: Path | None,
    tokenizer: Any,
    console: Console,
) -> None:
    """The samples that are missing, into the store."""
    jobs = [
        Job(benchmark, prompt, number)
        for benchmark, prompts in problems
        for there in [store.read(benchmark.name)]
        for prompt in prompts
        for number in range(settings.samples)
        if (prompt.id, number) not in there
    ]
    if jobs:
        folder = hugging_face(model, store.folder / "model")
        spread = EvaluationCritic(hugging_face(critic, store.folder / "critic")).head_std if critic else None
        sample(jobs, settings, folder, tokenizer, spread, store, console)


def _problems(benchmark: Benchmark, settings: Settings, model: Path, tokenizer: Any, console: Console) -> list[Prompt]:
    prompts = read(benchmark, settings.data, settings.data_config(), tokenizer)
    prompts.check_ids(Architecture.from_folder(model).vocab_size, model)
    for line in prompts.report:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return prompts.prompts


def _results(benchmark: Benchmark, prompts: list[Prompt], samples: int, store: SampleStore) -> dict[str, Any]:
    """The figures of the first ``samples`` samples of each problem, as JSON."""
    there = store.read(benchmark.name)
    stored = [[there[prompt.id, number] for number in range(samples)] for prompt in prompts]
    outcomes = [[item.outcome for item in of] for of in stored]
    found = {
        name: figure._asdict() if isinstance(figure, Estimate) else figure for name, figure in figures(outcomes).items()
    }
    spreads = [(item.head_std, item.tokens) for of in stored for item in of if item.head_std is not None]
    if spreads:  # of a token, as in training
        found["head_std"] = sum(std * tokens for std, tokens in spreads) / sum(tokens for _, tokens in spreads)
    return {"title": benchmark.title, "problems": len(prompts), "samples": samples, **finite(found)}


def _table(results: dict[str, dict[str, Any]]) -> Table:
    """A row per benchmark, and their mean where there are several; results.json holds what has no column."""
    rows = list(results.values())
    largest = f"pass@{rows[0]['samples']}"
    unjudged = ["unjudged"] if any(row["unjudged"] for row in rows) else []  # the figures are of the others alone
    shown = ("avg@", largest, "maj@", "length", "truncated", *unjudged, "ppl_", "head_std")
    names = [name for name in rows[0] if name.startswith(shown)]
    table = Table(Column("benchmark", no_wrap=True), "problems", *names)
    for row in rows:
        table.add_row(Text(row["title"]), str(row["problems"]), *(_cell(row[name]) for name in names))
    if len(rows) > 1:
        means = [_mean([row[name]["value"] for row in rows]) if "@" in name else "" for name in names]
        table.add_row("mean", "", *means)
    return table


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.1%}" if len(known) == len(values) else "-"  # of fewer benchmarks it is another figure


def _cell(figure: Any) -> str:
    if isinstance(figure, dict):
        if figure["value"] is None:  # no response was judged
            return "-"
        return f"{figure['value']:.1%}\n{100 * figure['low']:.0f}-{100 * figure['high']:.0f}"
    return "-" if figure is None else f"{figure:.3g}" if abs(figure) < 1000 else f"{figure:.0f}"
