"""A model on benchmarks: samples, verdicts, figures. tools/evaluate.py is the door.

Every sample depends on (seed, problem, sample index) alone, and is on disk before the next batch starts: an evaluation
that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from megatron_rlvr.benchmarks import Benchmark, find, read
from megatron_rlvr.evaluation import Estimate, figures, mean
from megatron_rlvr.evaluation_critic import EvaluationCritic
from megatron_rlvr.evaluation_models import find_critic, find_model, hugging_face, identity
from megatron_rlvr.evaluation_settings import Settings
from megatron_rlvr.rollout.engine import Request, Sample
from megatron_rlvr.rollout.sampler import Sampler
from megatron_rlvr.sample_store import SampleStore, StoredSample
from megatron_rlvr.seeds import stable_seed
from megatron_rlvr.types import Prompt
from megatron_rlvr.verdict import Verdict
from megatron_rlvr.verifiers.pool import VerifierPool

# Prompt and response, token ids -> how far a critic's heads disagree on the response.
Spread = Callable[[Sequence[int], Sequence[int]], float]


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
    model, benchmarks = find_model(settings.model), [find(name, settings.verifier) for name in settings.benchmarks]
    critic = find_critic(settings.critic) if settings.critic else None
    from transformers import AutoTokenizer  # an import of seconds, which no mistake above waits for

    tokenizer = AutoTokenizer.from_pretrained(model)
    problems = [(item, _problems(item, settings, tokenizer, console)) for item in benchmarks]
    output = Path(settings.output)
    sampled = settings.identity() | {"model": identity(model), "critic": identity(critic) if critic else None}
    store = SampleStore(output, sampled)
    jobs = [
        Job(benchmark, prompt, sample)
        for benchmark, prompts in problems
        for there in [store.read(benchmark.name)]
        for prompt in prompts
        for sample in range(settings.samples)
        if (prompt.id, sample) not in there
    ]
    if jobs:
        folder = hugging_face(model, output / "model")
        spread = EvaluationCritic(hugging_face(critic, output / "critic")).head_std if critic else None
        _sample(jobs, settings, folder, tokenizer, spread, store, console)
    results = {item.name: _results(item, prompts, settings.samples, store) for item, prompts in problems}
    written = {"settings": sampled | {"samples": settings.samples}, "benchmarks": results}
    (output / "results.json").write_text(json.dumps(written, indent=1) + "\n")
    console.print(_table(results))
    return written


def _problems(benchmark: Benchmark, settings: Settings, tokenizer: Any, console: Console) -> list[Prompt]:
    prompts = read(benchmark, settings.data, settings.data_config(), tokenizer)
    for line in prompts.report:
        console.print(line, highlight=False, soft_wrap=True)
    return prompts.prompts


def _sample(
    jobs: list[Job],
    settings: Settings,
    model: Path,
    tokenizer: Any,
    spread: Spread | None,
    store: SampleStore,
    console: Console,
) -> None:
    """Batch by batch: sampled, judged, written; ``spread`` is a critic's, of a prompt and its response."""
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
            gpu_memory_utilization=settings.gpu_memory,
        )
        stack.enter_context(closing(sampler))
        for start in range(0, len(jobs), settings.batch):
            batch = jobs[start : start + settings.batch]
            samples = sampler.generate([_request(job, settings) for job in batch])
            # As in training: without the end token, but with any other special one, which a verifier must see.
            texts = [tokenizer.decode(said(sample)) for sample in samples]
            verdicts = _judge(batch, texts, pools)
            spreads = [
                spread(job.prompt.token_ids, sample.response_ids) if spread else None
                for job, sample in zip(batch, samples, strict=True)
            ]
            for name in sorted({job.benchmark.name for job in batch}):
                rows = zip(batch, samples, texts, verdicts, spreads, strict=True)
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


def _stored(job: Job, sample: Sample, text: str, verdict: Verdict, head_std: float | None) -> StoredSample:
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
        head_std=head_std,
    )


def _results(benchmark: Benchmark, prompts: list[Prompt], samples: int, store: SampleStore) -> dict[str, Any]:
    """The figures of the first ``samples`` samples of each problem, as JSON."""
    there = store.read(benchmark.name)
    stored = [[there[prompt.id, sample] for sample in range(samples)] for prompt in prompts]
    outcomes = [[item.outcome for item in of] for of in stored]
    found = {
        name: figure._asdict() if isinstance(figure, Estimate) else None if figure != figure else figure
        for name, figure in figures(outcomes).items()
    }
    spreads = [(item.head_std, item.tokens) for of in stored for item in of if item.head_std is not None]
    if spreads:  # of a token, as in training
        found["head_std"] = sum(std * tokens for std, tokens in spreads) / sum(tokens for _, tokens in spreads)
    return {"title": benchmark.title, "problems": len(prompts), "samples": samples, **found}


def _table(results: dict[str, dict[str, Any]]) -> Table:
    """A row per benchmark, and their mean where there are several; results.json holds what has no column."""
    rows = list(results.values())
    largest = f"pass@{rows[0]['samples']}"
    shown = ("avg@", largest, "maj@", "length", "truncated", "ppl_", "head_std")
    names = [name for name in rows[0] if name.startswith(shown)]
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
