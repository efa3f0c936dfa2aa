"""Prompts -> verified rollout groups on every rank: each engine replica samples and judges its share of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_rlvr import verifiers, watchdog
from megatron_rlvr.config import Config
from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.exploration.base import Exploration
from megatron_rlvr.rollout.engine import Engine, Request, Sample
from megatron_rlvr.seeds import stable_seed
from megatron_rlvr.types import Prompt, Rollout, RolloutGroup
from megatron_rlvr.verifiers.pool import VerifierPool

# A response's log-probs and those of the engine's most probable tokens -> a number per token by name.
Annotation = Callable[[list[float], list[list[float]]], dict[str, list[float]]]


@dataclass
class Collected:
    """Groups in the order of the prompts, and the seconds that this rank spent on each phase."""

    groups: list[RolloutGroup]
    seconds: dict[str, float] = field(default_factory=dict)


class RolloutCollector:
    """Splits prompts over the engine replicas; the first rank of a replica verifies what the replica sampled."""

    def __init__(
        self, config: Config, engine: Engine, tokenizer: Any, pool: VerifierPool | None, groups: ParallelGroups
    ) -> None:
        self.config, self.engine, self.tokenizer, self.pool, self.groups = config, engine, tokenizer, pool, groups
        self.replicas = groups.world_size // config.rollout_tp
        self.replica = groups.rank // config.rollout_tp
        self.speaks_for_replica = groups.rank % config.rollout_tp == 0

    def collect(
        self,
        prompts: list[Prompt],
        responses: int,
        *,
        step: int,
        attempt: int,
        policy_version: int,
        temperature: float,
        on_phase: Callable[..., None],
        exploration: Exploration | None = None,
    ) -> Collected:
        """``responses`` samples of each prompt; they depend on (seed, step, attempt, prompt, sample) alone.

        A prompt that comes twice, where one epoch ends and the next begins, goes on counting its samples.
        ``exploration`` annotates the tokens of what is trained on, if it reads the engine's distribution.
        ``on_phase`` is told which phase begins, and then with every response how many of this rank's share are done.
        """
        top = exploration.needs().rollout_top if exploration else 0
        started = time.perf_counter()
        mine_of = slice(self.replica, None, self.replicas)
        share, earlier = prompts[mine_of], earlier_appearances(prompts)[mine_of]
        requests = self._requests(share, earlier, responses, step, attempt, temperature, top)
        samples = iter(self.engine.generate(requests, _begun("generate", len(requests), on_phase)))
        sampled = time.perf_counter()
        ended = _begun("verify", len(requests), on_phase)
        mine = []
        if self.speaks_for_replica:
            annotate = exploration.annotate_sample if exploration and top else None
            mine = [
                RolloutGroup(prompt, self._rollouts(samples, responses, policy_version, annotate)) for prompt in share
            ]
            assert self.pool is not None
            verifiers.score_groups(mine, self.pool, ended)
        verified = time.perf_counter()
        _begun("gather", 0, on_phase)
        shares = [part for part in reduce.gather_objects(mine, self.groups.world) if part]
        ordered = [shares[place % self.replicas][place // self.replicas] for place in range(len(prompts))]
        seconds = {
            "generate": sampled - started,
            "verify": verified - sampled,
            "gather": time.perf_counter() - verified,
        }
        return Collected(ordered, seconds)

    def _requests(
        self,
        prompts: list[Prompt],
        earlier: list[int],
        responses: int,
        step: int,
        attempt: int,
        temperature: float,
        top: int,
    ) -> list[Request]:
        return [
            Request(
                prompt_token_ids=list(prompt.token_ids),
                seed=stable_seed(self.config.seed, step, attempt, prompt.id, times * responses + sample),
                max_tokens=self.config.rollout.max_response_length,
                temperature=temperature,
                top=top,
            )
            for prompt, times in zip(prompts, earlier, strict=True)
            for sample in range(responses)
        ]

    def _rollouts(
        self, samples: Iterator[Sample], responses: int, policy_version: int, annotate: Annotation | None
    ) -> list[Rollout]:
        rollouts = []
        for index in range(responses):
            sample = next(samples)
            text = self.tokenizer.decode(sample.said)
            rollout = Rollout(index, sample.response_ids, sample.log_probs, sample.finish_reason, policy_version, text)
            if annotate:
                rollout.extras = annotate(sample.log_probs, sample.top_log_probs)
            rollouts.append(rollout)
        return rollouts


def _begun(phase: str, responses: int, on_phase: Callable[..., None]) -> Callable[[int], None]:
    """A phase over so many responses begins; what is returned tells the watchdog and ``on_phase`` how it gets on."""
    watchdog.beat(phase)
    on_phase(phase)
    done = 0

    def ended(count: int) -> None:
        nonlocal done
        done += count
        watchdog.alive()
        on_phase(phase, f"{done}/{responses}")

    return ended


def earlier_appearances(prompts: list[Prompt]) -> list[int]:
    """How often each prompt has come before in the list: ids a, b, a -> 0, 0, 1."""
    seen: Counter[str] = Counter()
    counts = []
    for prompt in prompts:
        counts.append(seen[prompt.id])
        seen[prompt.id] += 1
    return counts
