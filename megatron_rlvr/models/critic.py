"""The critic: the policy's architecture with K values of each state on its last stage, where the policy has logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_rlvr import platform
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config
from megatron_rlvr.distributed.context import gather
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.reduce import broadcast_from_last_stage
from megatron_rlvr.metrics import Meter
from megatron_rlvr.models.build import build_chunks
from megatron_rlvr.models.trainable import Trainable
from megatron_rlvr.seeds import stable_seed
from megatron_rlvr.types import Batch, Microbatch, Update
from megatron_rlvr.weights.convert import load_hf

# The microbatch's share of the global loss (scalar), from the current values [t, H].
ValueLoss = Callable[[Microbatch, Tensor], Tensor]

HEAD = "output_layer"  # where GPTModel keeps what reads the last hidden state


class ValueHead(torch.nn.Module):
    """K values per token, in fp32; every tensor-parallel rank holds the whole head.

    Under sequence parallelism a rank has only its own tokens' hidden states: it computes their values, and the values
    are gathered, which are K numbers a token and not a hidden state. Its gradient is then that of its tokens alone, so
    the parameters are marked for Megatron's sum over the tensor-parallel ranks; without sequence parallelism each rank
    has the whole gradient, and nothing is summed.
    """

    def __init__(self, config: TransformerConfig, num_heads: int, spread: float, seed: int) -> None:
        """Heads that differ, from ``seed`` alone: their values of a hidden state of norm sqrt(h) are ~ N(0, spread)."""
        super().__init__()
        generator = torch.Generator().manual_seed(stable_seed(seed, "value head"))
        drawn = torch.randn(num_heads, config.hidden_size, generator=generator) * spread / math.sqrt(config.hidden_size)
        self.weight = torch.nn.Parameter(drawn.to(config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(num_heads, dtype=config.params_dtype))
        self.sequence_parallel = config.sequence_parallel
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, weight: None = None, runtime_gather_output: None = None) -> tuple[Tensor, None]:
        """hidden [t, 1, h] -> ([t, 1, K] fp32, None), as GPTModel calls its output layer."""
        values = F.linear(hidden.float(), self.weight.float(), self.bias.float())
        if self.sequence_parallel:  # what follows is the same on every rank, so its gradient is cut and not summed
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None


class Critic(Trainable):
    """``config.critic.num_heads`` values of each state, on a trunk that starts from the policy's weights or its own."""

    name = "critic"
    section = "critic.optimizer"
    signs = "critic/grad_norm"

    def __init__(self, config: Config, groups: ParallelGroups) -> None:
        self.groups, self.num_heads = groups, config.critic.num_heads
        self.path = path = config.critic.path or config.model.path
        self.architecture = Architecture.from_folder(path)
        # Untied, so that the embedding is nobody's output layer.
        chunks = build_chunks(config, replace(self.architecture, tied=False), groups)
        for chunk in chunks:
            if chunk.post_process:
                head = ValueHead(chunk.config, self.num_heads, config.critic.head_init, config.seed)
                chunk.output_layer = head.to(platform.device())
        load_hf(chunks, self.architecture, groups, path, head=HEAD)
        super().__init__(config, config.critic.optimizer, chunks, config.trainer.num_steps)

    def fill_values(self, batch: Batch) -> None:
        """One forward over the batch: fills values [T, H] on every rank, 0 outside the loss tokens."""
        parts = self.forward(batch.microbatches(), self._whole)
        held, shape = torch.cat(parts) if parts else None, (batch.num_tokens, self.num_heads)
        values = broadcast_from_last_stage(held, shape, torch.float32, self.groups)
        batch.values = torch.where(batch.loss_mask[:, None], values, 0.0)

    def _whole(self, values: Tensor, micro: Microbatch) -> Tensor:
        """[t, H] of the microbatch, of which context parallelism leaves this rank a stretch."""
        return gather(values, micro.num_tokens, self.groups.cp)

    def update(self, batch: Batch, update: Update, loss: ValueLoss) -> Meter:
        """One optimizer update; the meter, equal on every rank, holds critic/*."""
        microbatches = [batch.microbatch(*bounds) for bounds in update.microbatches]
        return self.train_step(microbatches, lambda values, micro: loss(micro, self._whole(values, micro)), Meter())
