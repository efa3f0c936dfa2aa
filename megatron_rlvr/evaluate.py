"""A model on benchmarks: samples, verdicts, figures. tools/evaluate.py is the door.

Every sample depends on (seed, problem, sample index) alone, and is on disk before the next batch starts: an evaluation
that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from megatron_rlvr.benchmarks import Benchmark, find, read
from megatron_rlvr.config import rule
from megatron_rlvr.evaluation import Estimate, figures, mean
from megatron_rlvr.evaluation_settings import Settings
from megatron_rlvr.rollout.engine import Request, Sample
from megatron_rlvr.rollout.sampler import Sampler
from megatron_rlvr.sample_store import SampleStore, StoredSample
from megatron_rlvr.seeds import stable_seed
from megatron_rlvr.types import Prompt
from megatron_rlvr.verdict import Verdict
from megatron_rlvr.verifiers.pool import VerifierPool


class Job(NamedTuple):
    """One response that is to be sampled."""

    benchmark: Benchmark
    prompt: Prompt
    sample: int


def evaluate(settings: Settings, console: Console) -> dict[str, Any]:
    """Sample and judge what is missing, write OUTPUT/results.json and print it as a table.

    Raises ConfigError: settings, a model, a benchmark or an output folder that cannot be used.
    """
    settings.check()
    model, benchmarks = model_folder(settings.model), [find(name) for name in settings.benchmarks]
    from transformers import AutoTokenizer  # an import of seconds, which no mistake above waits for

    tokenizer = AutoTokenizer.from_pretrained(model)
    problems = [(item, _problems(item, settings, tokenizer, console)) for item in benchmarks]
    store = SampleStore(Path(settings.output), settings.identity(model))
    jobs = [
        Job(benchmark, prompt, sample)
        for benchmark, prompts in problems
        for there in [store.read(benchmark.name)]
        for prompt in prompts
        for sample in range(settings.samples)
        if (prompt.id, sample) not in there
    ]
    if jobs:
        _sample(jobs, settings, model, tokenizer, store, console)
    results = {item.name: _results(item, prompts, settings.samples, store) for item, prompts in problems}
    written = {"settings": settings.identity(model) | {"samples": settings.samples}, "benchmarks": results}
    (Path(settings.output) / "results.json").write_text(json.dumps(written, indent=1) + "\n")
    console.print(_table(results))
    return written


def model_folder(name: str) -> Path:
    """A Hugging Face folder, or the hf/ of a training run's folder. Raises ConfigError."""
    folder = Path(name)
    if (folder / "hf" / "config.json").exists():
        return folder / "hf"
    rule(
        not (folder / "checkpoints").exists(),
        f"{folder} is a run without hf/, which it writes at its end: finish it with run.resume=must, or make a Hugging "
        f"Face folder of a checkpoint with tools/convert_hf.py export --megatron {folder}/checkpoints/step_N",
    )
    rule((folder / "config.json").exists(), f"{folder} is no Hugging Face folder (config.json) and no run (hf/)")
    return folder


def _problems(benchmark: Benchmark, settings: Settings, tokenizer: Any, console: Console) -> list[Prompt]:
    prompts = read(benchmark, settings.data, settings.data_config(), tokenizer)
    for line in prompts.report:
        console.print(line, highlight=False, soft_wrap=True)
    return prompts.prompts


def _sample(
    jobs: list[Job], settings: Settings, model: Path, tokenizer: Any, store: SampleStore, console: Console
) -> None:
    """Batch by batch: sampled, judged, written."""
    longest = max(len(job.prompt.token_ids) for job in jobs)
    with ExitStack() as stack:
        names = sorted({job.prompt.verifier for job in jobs})
        pools = {name: stack.enter_context(VerifierPool(name, settings.workers, settings.deadline)) for name in names}
        sampler = Sampler(
            model,
            longest + settings.max_tokens,
            dtype=settings.dtype,
            tp=settings.tp,
            max_running=settings.max_running,
            kv_cache_mib=settings.kv_cache_mib,
        )
        stack.enter_context(closing(sampler))
        for start in range(0, len(jobs), settings.batch):
            batch = jobs[start : start + settings.batch]
            samples = sampler.generate([_request(job, settings) for job in batch])
            # As in training: without the end token, but with any other special one, which a verifier must see.
            texts = [tokenizer.decode(said(sample)) for sample in samples]
            verdicts = _judge(batch, texts, pools)
            for name in sorted({job.benchmark.name for job in batch}):
                rows = zip(batch, samples, texts, verdicts, strict=True)
                store.append(name, [_stored(*row) for row in rows if row[0].benchmark.name == name])
            console.print(f"{start + len(batch)} of {len(jobs)} responses", highlight=False)


def _request(job: Job, settings: Settings) -> Request:
    return Request(
        prompt_token_ids=list(job.prompt.token_ids),
        seed=stable_seed(settings.seed, "evaluation", job.prompt.id, job.sample),
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )


def said(sample: Sample) -> list[int]:
    return sample.response_ids[:-1] if sample.finish_reason == "stop" else sample.response_ids


def _judge(batch: list[Job], texts: list[str], pools: dict[str, VerifierPool]) -> list[Verdict]:
    verdicts: dict[int, Verdict] = {}
    for name, pool in pools.items():
        mine = [index for index, job in enumerate(batch) if job.prompt.verifier == name]
        judged = pool.score([(texts[index], batch[index].prompt.answer) for index in mine])
        verdicts |= dict(zip(mine, judged, strict=True))
    return [verdicts[index] for index in range(len(batch))]


def _stored(job: Job, sample: Sample, text: str, verdict: Verdict) -> StoredSample:
    return StoredSample(
        id=job.prompt.id,
        sample=job.sample,
        reward=verdict.reward,
        status=verdict.status,
        extracted=verdict.extracted,
        tokens=len(sample.response_ids),
        finish_reason=sample.finish_reason,
        log_prob=sum(sample.log_probs),
        text=text if job.benchmark.shown else blake2b(text.encode(), digest_size=16).hexdigest(),
    )


def _results(benchmark: Benchmark, prompts: list[Prompt], samples: int, store: SampleStore) -> dict[str, Any]:
    """The figures of the first ``samples`` samples of each problem, as JSON."""
    there = store.read(benchmark.name)
    outcomes = [[there[prompt.id, sample].outcome for sample in range(samples)] for prompt in prompts]
    found = {
        name: figure._asdict() if isinstance(figure, Estimate) else None if figure != figure else figure
        for name, figure in figures(outcomes).items()
    }
    return {"title": benchmark.title, "problems": len(prompts), "samples": samples, **found}


def _table(results: dict[str, dict[str, Any]]) -> Table:
    """A row per benchmark, and their mean where there are several; results.json holds what has no column."""
    rows = list(results.values())
    largest = f"pass@{rows[0]['samples']}"
    names = [name for name in rows[0] if name.startswith(("avg@", largest, "maj@", "length", "truncated", "ppl_"))]
    table = Table("benchmark", "problems", *names)
    for row in rows:
        table.add_row(row["title"], str(row["problems"]), *(_cell(row[name]) for name in names))
    if len(rows) > 1:
        means = [mean([row[name]["value"] for row in rows]) if "@" in name else None for name in names]
        table.add_row("mean", "", *("" if value is None else f"{value:.1%}" for value in means))
    return table


def _cell(figure: Any) -> str:
    if isinstance(figure, dict):
        return f"{figure['value']:.1%}\n{100 * figure['low']:.0f}-{100 * figure['high']:.0f}"
    return "-" if figure is None else f"{figure:.3g}" if abs(figure) < 1000 else f"{figure:.0f}"
