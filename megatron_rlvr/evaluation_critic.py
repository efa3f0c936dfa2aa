"""How far a critic's heads disagree on responses that it has not learned from, for an evaluation.

critic = EvaluationCritic("runs/ppo/critic_hf")
critic.head_std(prompt_ids=[3, 11, 5], response_ids=[7, 2])

One response at a time, by transformers, on one device: an evaluation has no Megatron ranks. Inside training the critic
itself gives eval/head_std, whatever its layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from megatron_rlvr import platform
from megatron_rlvr.weights.sources import Checkpoint


class EvaluationCritic:
    """The K values of each state, from a critic's Hugging Face folder. Raises ConfigError for a damaged one."""

    def __init__(self, folder: Path) -> None:
        platform.spare_attention_plans()
        with Checkpoint(folder) as checkpoint:
            head = {name: tensor.float().to(platform.device()) for name, tensor in checkpoint.value_head().items()}
        self._weight, self._bias = head["weight"], head["bias"]
        self._trunk = AutoModel.from_pretrained(folder, dtype="auto").eval().to(platform.device())

    @torch.no_grad()
    def values(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Tensor:
        """[Lr, K] fp32: of the state before each token of the response."""
        tokens = torch.tensor([[*prompt_ids, *response_ids[:-1]]], device=platform.device())
        hidden = self._trunk(tokens).last_hidden_state[0, len(prompt_ids) - 1 :]
        return F.linear(hidden.float(), self._weight, self._bias)

    def head_std(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> float:
        """Standard deviation over the heads (of the K themselves, not of a larger lot), mean over the tokens."""
        return float(self.values(prompt_ids, response_ids).std(dim=1, correction=0).mean())
