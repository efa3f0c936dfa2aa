"""Language models that give token statistics: the policy, which takes updates, and the frozen reference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config
from megatron_rlvr.distributed.context import gather, gather_statistics, stretch
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.reduce import broadcast_from_last_stage
from megatron_rlvr.distributed.vocab import StatisticsOptions, TokenStatistics, token_statistics
from megatron_rlvr.distributed.vocab_linear import linear_token_statistics
from megatron_rlvr.metrics import Meter
from megatron_rlvr.models import schedule
from megatron_rlvr.models.build import build_chunks, leave_out_output_layer, output_weight, without_output_layer
from megatron_rlvr.models.trainable import Trainable
from megatron_rlvr.types import Batch, Microbatch, Update
from megatron_rlvr.weights.convert import load_hf
from megatron_rlvr.weights.gather import hf_weights

# The microbatch's share of the global loss (scalar), from the current policy's statistics.
LossFunction = Callable[[Microbatch, TokenStatistics, Meter], Tensor]

# What every pass gives, [T]; with options.top there is more.
_FIELDS = ("log_prob", "entropy", "max_log_prob", "sum_squares", "log_kept_mass", "proxy_log_prob", "rank")


class LanguageModel(ABC):
    """A model over a vocabulary, sharded as ``config.parallel`` says."""

    architecture: Architecture
    groups: ParallelGroups
    path: str  # the Hugging Face folder
    chunks: list[GPTModel]
    fused: bool
    logits_dtype: torch.dtype | None

    @abstractmethod
    def forward(self, microbatches: list[Microbatch], consume: schedule.Consumer) -> list:
        """A pass without gradients or dropout; on the last stage what ``consume`` makes of each microbatch."""

    def build(self, config: Config, architecture: Architecture, groups: ParallelGroups) -> list[GPTModel]:
        """This rank's chunks with the weights of ``config.model.path``; fused ones end in hidden states."""
        self.architecture, self.groups, self.path = architecture, groups, config.model.path
        self.sequence_parallel, form = config.parallel.sequence_parallel, architecture.logits_form(config)
        self.fused, self.logits_dtype = form != "materialised", torch.float32 if form == "fused_float32" else None
        chunks = build_chunks(config, architecture, groups)
        load_hf(chunks, architecture, groups, config.model.path)
        if self.fused:
            leave_out_output_layer(chunks[-1])
        return chunks

    def statistics(self, output: Tensor, micro: Microbatch, options: StatisticsOptions) -> TokenStatistics:
        """Last stage's logits [t, V/tp], or fused its hidden states -> statistics of the tokens that follow.

        Where the batch knows the old policy's most probable tokens, the KL to them is among the statistics. Under
        context parallelism the output is a stretch of the tokens, and the statistics are of all.
        """
        multiple, cp = self.groups.tp_size if self.sequence_parallel else 1, self.groups.cp
        targets, old_top = stretch(micro.target_ids, multiple, cp), None
        if micro.has("old_top_ids"):  # and nothing kept where there is no token
            ids, log_probs = micro.old_top_ids, micro.old_top_log_probs
            old_top = stretch(ids, multiple, cp, fill=-1), stretch(log_probs, multiple, cp, fill=-torch.inf)
        vocab_size = self.architecture.vocab_size
        shared = {"group": self.groups.tp, "vocab_size": vocab_size, "old_top": old_top, **vars(options)}
        if self.fused:
            shared |= {"sequence_parallel": self.sequence_parallel, "logits_dtype": self.logits_dtype}
            found = linear_token_statistics(output, output_weight(self.chunks[-1]), targets, **shared)
        else:  # the matrix product that made the logits does not need them again
            found = token_statistics(output, targets, overwrite=True, **shared)
        return gather_statistics(found, micro.num_tokens, cp)

    def score(self, batch: Batch, options: StatisticsOptions) -> TokenStatistics:
        """One forward over the batch: every statistic [T], on every rank."""
        parts = self.forward(batch.microbatches(), lambda output, micro: self.statistics(output, micro, options))

        def whole(name: str, dtype: torch.dtype, *width: int) -> Tensor:
            held = torch.cat([getattr(part, name) for part in parts]) if parts else None
            return broadcast_from_last_stage(held, (batch.num_tokens, *width), dtype, self.groups)

        values = {name: whole(name, torch.float32) for name in _FIELDS}
        if options.top:
            values["top_ids"] = whole("top_ids", torch.int64, options.top)
            values["top_log_probs"] = whole("top_log_probs", torch.float32, options.top)
            values["top_cut"] = whole("top_cut", torch.bool)
        return TokenStatistics(**values)


class Policy(Trainable, LanguageModel):
    """The model of ``config.model.path``, and then what the updates make of it."""

    def __init__(self, config: Config, architecture: Architecture, groups: ParallelGroups) -> None:
        chunks = self.build(config, architecture, groups)
        super().__init__(config, config.optimizer, chunks, config.trainer.num_steps - config.critic_warmup)

    def fill_log_probs(self, batch: Batch, options: StatisticsOptions) -> TokenStatistics:
        """One forward over the batch: fills old_log_probs and entropy, returns every statistic, on every rank.

        With ``options.top`` it fills old_top_ids and old_top_log_probs too.
        """
        statistics = self.score(batch, options)
        if statistics.top_ids is not None and statistics.top_log_probs is not None:
            batch.old_top_ids, batch.old_top_log_probs = statistics.top_ids, statistics.top_log_probs
        batch.old_log_probs = torch.where(batch.loss_mask, statistics.log_prob, 0.0)
        batch.entropy = torch.where(batch.loss_mask, statistics.entropy, 0.0)
        return statistics

    def fill_states(self, batch: Batch, which: str) -> None:
        """One forward over the batch, without logits: fills states [S, h] on every rank.

        ``which``: the last norm's output at the response's last token or the second to last, or its mean over prompt
        and response.
        """

        def consume(hidden: Tensor, micro: Microbatch) -> Tensor:
            if self.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden)
            return response_states(gather(hidden, micro.num_tokens, self.groups.cp).float(), micro, which)

        with without_output_layer(self.chunks[-1]):
            parts = self.forward(batch.microbatches(), consume)
        shape = (batch.num_responses, self.architecture.hidden_size)
        held = torch.cat(parts) if parts else None
        batch.states = broadcast_from_last_stage(held, shape, torch.float32, self.groups)

    def update(self, batch: Batch, update: Update, loss: LossFunction, options: StatisticsOptions) -> Meter:
        """One optimizer update; the meter, equal on every rank, holds the loss's own entries and policy/*."""
        meter, without_top = Meter(), replace(options, top=0)  # whose most probable tokens nobody would read

        def consume(output: Tensor, micro: Microbatch) -> Tensor:
            return loss(micro, self.statistics(output, micro, without_top), meter)

        return self.train_step([batch.microbatch(*bounds) for bounds in update.microbatches], consume, meter)

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) on every rank, one bucket at a time."""
        return hf_weights(self.chunks, self.architecture, self.groups)


def response_states(hidden: Tensor, micro: Microbatch, which: str) -> Tensor:
    """[t, h] -> [s, h]: a response's hidden state at its last token or the one before, or the mean over all."""
    ends = micro.cu_seqlens[1:].long()
    if which != "mean":
        return hidden[ends - {"last": 1, "second_last": 2}[which]]
    lengths = (ends - micro.cu_seqlens[:-1]).tolist()
    # one by one: a GPU's index_add adds in an order of its own, and ranks that hold copies have to agree
    return torch.stack([response.mean(dim=0) for response in hidden.split(lengths)])


class Reference(LanguageModel):
    """The model of ``config.model.path`` as it is, without gradients or optimizer: what the policy set out from."""

    def __init__(self, config: Config, architecture: Architecture, groups: ParallelGroups) -> None:
        self.chunks = self.build(config, architecture, groups)
        for chunk in self.chunks:
            chunk.requires_grad_(False).eval()

    def forward(self, microbatches: list[Microbatch], consume: schedule.Consumer) -> list:
        return schedule.forward(self.chunks, microbatches, consume, self.groups.cp)

    def fill_log_probs(self, batch: Batch, options: StatisticsOptions) -> TokenStatistics:
        """One forward over the batch: fills ref_log_probs, returns every statistic [T], on every rank."""
        statistics = self.score(batch, replace(options, top=0))
        batch.ref_log_probs = torch.where(batch.loss_mask, statistics.log_prob, 0.0)
        return statistics
