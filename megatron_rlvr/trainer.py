"""The RL step; run.py has the run around it.

    prompts -> rollouts -> verdicts -> packed batch -> reference, old log-probs and values, where something reads them
            -> rewards -> advantages -> updates of critic and policy -> weight sync

Every rank runs this same program; what differs between ranks is hidden in the groups, the policy and the engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from megatron_rlvr import platform, verifiers, watchdog
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config, SourceConfig
from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.vocab import TokenStatistics
from megatron_rlvr.evaluation import summarise
from megatron_rlvr.exploration.base import build as build_exploration
from megatron_rlvr.group_advantages import group_advantages
from megatron_rlvr.losses import LOSSES, Clip, clipped_value_loss, kl_penalty, record, reduction_weights
from megatron_rlvr.metrics import Meter
from megatron_rlvr.models import sharded_state
from megatron_rlvr.models.build import initialize_parallel
from megatron_rlvr.models.critic import Critic
from megatron_rlvr.models.policy import Policy, Reference
from megatron_rlvr.packing import pack
from megatron_rlvr.prompt_files import source_name, stem
from megatron_rlvr.prompts import PromptSet, load_prompts
from megatron_rlvr.recorder import FlightRecorder
from megatron_rlvr.rollout.collect import RolloutCollector
from megatron_rlvr.rollout.enough import Sampled, sample
from megatron_rlvr.rollout.vllm_engine import VllmEngine
from megatron_rlvr.token_records import Recording
from megatron_rlvr.tokenizer import load_tokenizer
from megatron_rlvr.types import Batch, Microbatch, RolloutGroup, Update
from megatron_rlvr.value_targets import fill_targets
from megatron_rlvr.verdict import Verdict
from megatron_rlvr.verifiers.pool import VerifierPool
from megatron_rlvr.weights.weight_sync import WeightSync

log = logging.getLogger(__name__)

EVALUATION = -1  # the step that evaluation seeds are derived from: the same samples whenever the policy is the same


class Trainer:
    """Policy, engine, verifiers and methods of one run; ``step`` is the algorithm."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.groups = initialize_parallel(config)
        self.architecture = Architecture.from_folder(config.model.path)
        self.exploration = build_exploration(config.exploration, config)
        needs = self.exploration.needs()
        self.states = needs.states
        self.statistics = needs.statistics(config.rollout.temperature)
        self.old_policy_pass = needs.old_statistics or config.learns_from_older
        self.tokenizer = load_tokenizer(config.model.path)
        self.prompts = self._load_prompts(config.data.train_sources)
        held_out = config.data.held_out_sources
        self.held_out = {stem(source_name(source.path)): self._load_prompts([source]) for source in held_out}
        for name, prompts in self.held_out.items():
            if shared := prompts.shared_with(self.prompts):
                log.warning("%d of the %d held-out prompts of %s are trained on too", shared, len(prompts), name)
        self.policy = Policy(config, self.architecture, self.groups)
        self.critic = Critic(config, self.groups) if config.has_critic else None
        self.models = {"policy": self.policy} | ({"critic": self.critic} if self.critic else {})
        is_compared = config.algorithm.kl.coefficient > 0 or needs.reference
        self.reference = Reference(config, self.architecture, self.groups) if is_compared else None
        for model in self.models.values():
            sharded_state.allocate(model)  # before the engine asks how much memory is free
        self.engine = VllmEngine(config, self.groups, needs.rollout_top)
        self.weight_sync = WeightSync(self.engine, self.architecture, self.groups)
        self.collector = RolloutCollector(config, self.engine, self.tokenizer, self._start_verifiers(), self.groups)
        self.prompt_position = 0  # prompts consumed so far
        self.policy_version = 0  # optimizer updates that the engine's weights have seen
        self.seconds: dict[str, float] = {}
        self.recorder = FlightRecorder(config.logging.record_responses, needs.threshold is not None, self.groups)
        self.recording = Recording([], {})  # of the last step
        # Told when a phase of the step begins, and where it takes long, how much of it is done.
        self.on_phase: Callable[..., None] = lambda *said: None

    def _load_prompts(self, sources: list[SourceConfig]) -> PromptSet:
        prompts = load_prompts(sources, self.config.data, self.tokenizer, self.config.verifier)
        prompts.check_ids(self.architecture.vocab_size, self.config.model.path)
        for line in prompts.report:
            log.info("%s", line)
        return prompts

    def _start_verifiers(self) -> VerifierPool | None:
        if self.groups.rank % self.config.rollout_tp:
            return None  # the first rank of each engine replica judges for all of it
        return VerifierPool(self.config.verifier, self.config.reward.workers, self.config.reward.deadline)

    def step(self, step: int) -> tuple[dict[str, Any], list[RolloutGroup]]:
        """One step, counted from 1: its metrics, equal on every rank, and its rollouts."""
        started, self.seconds, meter = time.perf_counter(), {}, Meter()
        sampled = self.rollout(step)
        groups = sampled.kept
        batch = self.pack(groups, self.config.trainer.updates_per_rollout)
        self.recorder.start(batch, groups)
        policy_learns = step > self.config.critic_warmup  # the critic goes ahead
        reference = None
        if self.reference:
            with self.phase("reference"):
                reference = self.reference.fill_log_probs(batch, self.statistics)
        if self.old_policy_pass or not policy_learns:
            with self.phase("log_probs"):
                old = self.policy.fill_log_probs(batch, self.statistics)
            batch.extras.update(self.exploration.annotate(batch, old, reference))
            measure_old_policy(batch, meter)
            self.recorder.old_policy(batch, old)
        if self.states:
            with self.phase("states"):
                self.policy.fill_states(batch, self.states)
        if self.critic:
            with self.phase("values"):
                self.critic.fill_values(batch)
        rewards = self.exploration.shape_rewards(batch, self.groups, step - 1, meter)
        batch.advantages = self.advantages(batch, rewards, groups, step, meter)
        batch.advantages = self.exploration.shape_advantages(batch, self.groups, step - 1, meter)
        updates = Meter()
        if self.critic:
            with self.phase("critic"):
                for update in batch.updates:
                    updates.merge(self.critic.update(batch, update, self.value_loss))
        with self.phase("train"):
            for update in batch.updates if policy_learns else ():
                self.exploration.prepare_update(batch, update, self.groups)
                updates.merge(self.policy.update(batch, update, partial(self.loss, update), self.statistics))
                self.policy_version += 1
        self.recording = self.recorder.collect(batch)
        with self.phase("sync"):
            sync = self.push_weights()
        metrics = {
            **sampled.metrics(),
            **reduce.reduce_meter(meter, self.groups).means(),
            **updates.means(),
        }
        metrics |= {f"sync/{name}": value for name, value in sync.metrics().items()}
        return metrics | self._times(time.perf_counter() - started, batch), groups

    def rollout(self, step: int) -> Sampled:
        """Prompts, responses, verdicts; more of them while a method turns groups away."""

        def collect(count: int, generation: int) -> list[RolloutGroup]:
            prompts = self.prompts.take(self.prompt_position, count, self.config.seed, self.config.data.shuffle)
            self.prompt_position += len(prompts)
            collected = self.collector.collect(
                prompts,
                self.config.rollout.responses_per_prompt,
                step=step,
                attempt=generation,
                policy_version=self.policy_version,
                temperature=self.config.rollout.temperature,
                exploration=self.exploration,
                on_phase=self.on_phase,
            )
            for phase, seconds in collected.seconds.items():
                self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
            return collected.groups

        wanted, max_error_share = self.config.rollout.prompts_per_step, self.config.reward.max_error_share
        return sample(wanted, collect, self.exploration.keep_group, max_error_share)

    def pack(self, groups: list[RolloutGroup], updates: int) -> Batch:
        """This data-parallel rank's share of the groups, in so many updates, on its device."""
        scale = self.config.reward.scale
        rewards = [
            [
                verifiers.reward_of(item.verdict, scale) if verifiers.is_scored(item.verdict) else None
                for item in group.rollouts
            ]
            for group in groups
        ]
        batch = pack(
            groups,
            rewards,
            updates=updates,
            microbatch_tokens=self.config.trainer.microbatch_tokens,
            dp_rank=self.groups.dp_rank,
            dp_size=self.groups.dp_size,
            microbatch_multiple=self.config.microbatch_multiple,
        )
        return batch.to(platform.device())

    def advantages(self, batch: Batch, rewards: Tensor, groups: list[RolloutGroup], step: int, meter: Meter) -> Tensor:
        """[S] shaped rewards -> [T] advantages: over what the critic expected, or over the other responses."""
        if self.critic:
            seed, kl = (self.config.seed, step), self.config.algorithm.kl
            batch.advantages = fill_targets(batch, rewards, self.config.critic, seed, self.groups, meter, kl)
            raw = self.exploration.shape_raw_advantages(batch, self.groups, step - 1, meter)
            return reduce.whiten(raw, batch.loss_mask, self.groups.dp)
        scored = torch.tensor(
            [[verifiers.is_scored(rollout.verdict) for rollout in group.rollouts] for group in groups]
        )
        return group_advantages(batch, rewards, scored.to(rewards.device), self.config.algorithm, self.groups, meter)

    def loss(self, update: Update, micro: Microbatch, current: TokenStatistics, meter: Meter) -> Tensor:
        """The microbatch's share of the global loss, a scalar."""
        algorithm = self.config.algorithm
        clip = Clip(algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip)
        if not self.old_policy_pass:
            micro.old_log_probs, micro.entropy = current.log_prob.detach(), current.entropy.detach()
            measure_old_policy(micro, meter)
            self.recorder.old_policy(micro, current)
        losses, clipped = LOSSES[algorithm.loss](current.log_prob, micro, clip)
        record(micro, current.log_prob, clipped, meter)
        losses = self.exploration.policy_loss(losses, micro, current, meter)
        self.recorder.loss(micro, current, clipped)
        if algorithm.kl.coefficient > 0 and algorithm.kl.where == "loss":
            losses = losses + kl_penalty(micro, current.log_prob, algorithm.kl, meter)
        weights = reduction_weights(micro, update, algorithm.reduction, self.config.rollout.max_response_length)
        return torch.where(micro.loss_mask, weights * losses, 0.0).sum()

    def value_loss(self, micro: Microbatch, values: Tensor) -> Tensor:
        """The microbatch's share of the critic's global loss, a scalar."""
        losses = clipped_value_loss(values, micro.values, micro.returns, self.config.critic.value_clip)
        return (micro.value_weights * losses).sum()

    def push_weights(self):
        """The policy's weights into the engine, each tensor proven equal there. Raises WeightSyncError."""
        return self.weight_sync.push(self.policy.hf_weights())

    def evaluate(self) -> dict[str, float]:
        """eval/* figures over every held-out prompt; eval/SOURCE/* of each source's own, where there are several.

        Raises VerifierError where the verifier fails on too many: the figures of the others would flatter.
        """
        prompts = [prompt for source in self.held_out.values() for prompt in source.prompts]
        settings = self.config.trainer
        groups = self.collector.collect(
            prompts,
            settings.eval_responses,
            step=EVALUATION,
            attempt=0,
            policy_version=self.policy_version,
            temperature=settings.eval_temperature or self.config.rollout.temperature,
            on_phase=lambda name, *done: self.on_phase(f"evaluation: {name}", *done),
        ).groups
        verdicts = [rollout.verdict for group in groups for rollout in group.rollouts]
        verifiers.check_error_share(verdicts, self.config.reward.max_error_share)
        metrics = self.held_out_figures(groups, "eval")
        rest = iter(groups)
        for name, source in self.held_out.items() if len(self.held_out) > 1 else ():
            metrics |= self.held_out_figures(list(islice(rest, len(source))), f"eval/{name}")
        return metrics

    def held_out_figures(self, groups: list[RolloutGroup], prefix: str) -> dict[str, float]:
        figures = summarise(groups) | (self.held_out_values(groups) if self.critic else {})
        return {f"{prefix}/{name}": value for name, value in figures.items()}

    def held_out_values(self, groups: list[RolloutGroup]) -> dict[str, float]:
        """head_std and explained_variance of the critic, on responses that it does not learn from.

        Data-parallel ranks (and stages, where they interleave) take equally many: copies that count nowhere fill up.
        """
        assert self.critic is not None
        missing = -len(groups) % (self.groups.dp_size * self.config.microbatch_multiple)
        batch, meter = self.pack([*groups, *[unjudged(groups[0])] * missing], updates=1), Meter()
        self.critic.fill_values(batch)
        seed = (self.config.seed, EVALUATION)
        fill_targets(batch, batch.rewards, self.config.critic, seed, self.groups, meter)
        figures = reduce.reduce_meter(meter, self.groups).means()
        names = ("head_std", "explained_variance")  # the second only where returns differ
        return {name: figures[f"critic/{name}"] for name in names if f"critic/{name}" in figures}

    def close(self) -> None:
        """End the verifiers and the engine; the engine's end also ends the process group."""
        if self.collector.pool is not None:
            self.collector.pool.close()
        self.engine.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        watchdog.beat(name)
        self.on_phase(name)
        yield
        self.seconds[name] = time.perf_counter() - started

    def _times(self, total: float, batch: Batch) -> dict[str, float]:
        times = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        tokens = sum(update.num_tokens for update in batch.updates)  # of every rank's responses
        used = torch.tensor(float(platform.memory_in_use()), device=platform.device()) / 2**30
        most, least = reduce.all_max(torch.stack([used, -used]), self.groups.world).tolist()
        memory = {"memory/rank_most_gib": most, "memory/rank_least_gib": -least}
        return times | {"time/step": total, "tokens/per_second": tokens / total} | memory


def unjudged(group: RolloutGroup) -> RolloutGroup:
    """A copy whose responses are in no loss and in no count."""
    verdict = Verdict(0.0, "error", message="a copy that fills up the ranks")
    return replace(group, rollouts=[replace(rollout, verdict=verdict) for rollout in group.rollouts])


def measure_old_policy(tokens: Microbatch, meter: Meter) -> None:
    """Entropy, and how far the engine's log-probs are from the policy's own: two programs, one set of weights."""
    mask = tokens.loss_mask
    gap = (tokens.old_log_probs - tokens.rollout_log_probs).abs()[mask]
    meter.add("policy/entropy", tokens.entropy[mask].sum(), mask.sum())
    meter.add("rollout/log_prob_gap_mean", gap.sum(), mask.sum())
    meter.maximum("rollout/log_prob_gap_max", gap.max() if gap.numel() else 0.0)
