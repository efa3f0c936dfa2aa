"""The responses of an evaluation: sampled, judged and written, batch by batch, with a bar that shows how it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_rlvr.benchmarks import Benchmark
from megatron_rlvr.evaluation_settings import Settings
from megatron_rlvr.rollout.engine import Request, Sample
from megatron_rlvr.rollout.sampler import Sampler
from megatron_rlvr.sample_store import SampleStore, StoredSample
from megatron_rlvr.seeds import stable_seed
from megatron_rlvr.types import Prompt
from megatron_rlvr.verdict import Verdict, is_right
from megatron_rlvr.verifiers import check_error_share
from megatron_rlvr.verifiers.pool import VerifierPool

# Prompt and response, token ids -> how far a critic's heads disagree on the response.
Spread = Callable[[Sequence[int], Sequence[int]], float]


class Job(NamedTuple):
    """One response that is to be sampled."""

    benchmark: Benchmark
    prompt: Prompt
    sample: int


def sample(
    jobs: list[Job],
    settings: Settings,
    model: Path,
    tokenizer: Any,
    spread: Spread | None,
    store: SampleStore,
    console: Console,
) -> None:
    """Every job's response, into the store; ``spread`` is a critic's.

    Raises ConfigError for an unusable model, VerifierError where too many of the verdicts so far are failures: what
    fails on wrong answers alone would leave the right ones. That batch is not stored, so the next start asks it again.
    """
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
        bar = stack.enter_context(_bar(len(jobs), console))
        asked = {job.benchmark.name for job in jobs}
        judged = [item.verdict for name in asked for item in store.read(name).values()]
        right = known = 0
        for start in range(0, len(jobs), settings.batch):
            batch = jobs[start : start + settings.batch]
            samples = sampler.generate([_request(job, settings) for job in batch], bar)
            texts = [tokenizer.decode(item.said) for item in samples]
            verdicts = _judge(batch, texts, pools)
            judged = verdicts + judged  # the new ones first: the error shows the first that failed
            check_error_share(judged, settings.max_error_share, keys=("--max-error-share", "--deadline"))
            rows = _measured(batch, samples, texts, verdicts, spread)
            for name in sorted({job.benchmark.name for job in batch}):
                store.append(name, [row for job, row in zip(batch, rows, strict=True) if job.benchmark.name == name])
            right += sum(row.outcome.right is True for row in rows)
            known += sum(row.outcome.right is not None for row in rows)
            share = f"{right / max(1, known):.1%} right"
            bar(0, share)
            if not console.is_terminal:
                console.print(f"{start + len(batch)} of {len(jobs)} responses, {share}", highlight=False)


@contextmanager
def _bar(total: int, console: Console) -> Iterator[Callable[..., None]]:
    """bar(responses that have ended, what to say of those judged); shown on a terminal alone."""
    columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda ended, said=None: progress.update(task, advance=ended, description=said)


def _measured(
    batch: list[Job], samples: list[Sample], texts: list[str], verdicts: list[Verdict], spread: Spread | None
) -> list[StoredSample]:
    rows = zip(batch, samples, texts, verdicts, strict=True)
    return [_stored(*row, spread(row[0].prompt.token_ids, row[1].response_ids) if spread else None) for row in rows]


def _request(job: Job, settings: Settings) -> Request:
    return Request(
        prompt_token_ids=list(job.prompt.token_ids),
        seed=stable_seed(settings.seed, "evaluation", job.prompt.id, job.sample),
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )


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
        right=is_right(verdict),
    )
