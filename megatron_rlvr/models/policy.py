"""The policy: a Megatron language model that gives token statistics and takes updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields

import torch
from torch import Tensor

from megatron_rlvr import platform
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.reduce import broadcast_from_last_stage, reduce_meter
from megatron_rlvr.distributed.vocab import StatisticsOptions, TokenStatistics, token_statistics
from megatron_rlvr.metrics import Meter
from megatron_rlvr.models.build import build_chunks
from megatron_rlvr.models.trainable import Trainable
from megatron_rlvr.types import Batch, Microbatch, Update
from megatron_rlvr.weights.convert import load_hf
from megatron_rlvr.weights.gather import hf_weights

# The microbatch's share of the global loss (scalar), from the current policy's statistics.
LossFunction = Callable[[Microbatch, TokenStatistics, Meter], Tensor]

_FIELDS = [item.name for item in fields(TokenStatistics)]


class Policy(Trainable):
    """The model of ``config.model.path``, sharded as ``config.parallel`` says."""

    def __init__(self, config: Config, architecture: Architecture, groups: ParallelGroups) -> None:
        self.architecture, self.groups = architecture, groups
        chunks = build_chunks(config, architecture, groups)
        load_hf(chunks, architecture, groups, config.model.path)
        super().__init__(config, config.optimizer, chunks, config.trainer.num_steps - config.critic_warmup)

    def statistics(self, logits: Tensor, micro: Microbatch, options: StatisticsOptions) -> TokenStatistics:
        """logits [t, V/tp] -> [t] statistics of the tokens that follow, over the whole vocabulary."""
        return token_statistics(
            logits,
            micro.target_ids,
            group=self.groups.tp,
            vocab_size=self.architecture.vocab_size,
            options=options,
            overwrite=True,  # the matrix product that made the logits does not need them again
        )

    def fill_log_probs(self, batch: Batch, options: StatisticsOptions) -> TokenStatistics:
        """One forward over the batch: fills old_log_probs and entropy, returns every statistic [T], on every rank."""

        def consume(logits: Tensor, micro: Microbatch) -> Tensor:
            statistics = self.statistics(logits, micro, options)
            return torch.stack([getattr(statistics, name) for name in _FIELDS])

        parts = self.forward(batch.microbatches(), consume)
        stacked = torch.cat(parts, dim=1) if parts else None
        stacked = broadcast_from_last_stage(
            stacked, (len(_FIELDS), batch.num_tokens), torch.float32, platform.device(), self.groups
        )
        statistics = TokenStatistics(*stacked.unbind(0))
        zero = torch.zeros_like(statistics.log_prob)
        batch.old_log_probs = torch.where(batch.loss_mask, statistics.log_prob, zero)
        batch.entropy = torch.where(batch.loss_mask, statistics.entropy, zero)
        return statistics

    def update(self, batch: Batch, update: Update, loss: LossFunction, options: StatisticsOptions) -> Meter:
        """One optimizer update; the meter, equal on every rank, holds the loss's own entries and policy/*."""
        meter = Meter()

        def consume(logits: Tensor, micro: Microbatch) -> Tensor:
            return loss(micro, self.statistics(logits, micro, options), meter)

        result = self.train_step([batch.microbatch(*bounds) for bounds in update.microbatches], consume)
        if self.groups.is_last_stage:
            # Shares of one global loss: their sum over microbatches and ranks is the loss itself.
            meter.add("policy/loss", torch.stack(result.losses).sum(), 1 / self.groups.dp_size)
        meter = reduce_meter(meter, self.groups)
        meter.add("policy/grad_norm", result.grad_norm)
        meter.add("policy/lr", result.learning_rate)
        return meter

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) on every rank, one bucket at a time."""
        return hf_weights(self.chunks, self.architecture, self.groups)
