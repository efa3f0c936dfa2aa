"""The same quantities from transformers in fp64, one response at a time: nothing packed, nothing sharded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rlvr.types import RolloutGroup

CLIP_LOW, CLIP_HIGH, ENTROPY_WEIGHT, KEPT_WEIGHT = 0.2, 0.28, 0.1, 0.3
TEMPERATURE, MIN_P, THRESHOLD_TEMPERATURE = 0.9, 0.1, 1.1


@dataclass(frozen=True)
class Sample:
    """One scored response with what the loss needs of it."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    old_log_probs: Tensor  # [Lr] fp32
    advantages: Tensor  # [Lr] fp32


def load(folder: Path) -> torch.nn.Module:
    """The model in fp64, its norms and softmax too, which transformers would compute in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm(module)
    return model


def _norm(module: torch.nn.Module):
    return lambda x: module.weight * x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


def statistics(model: torch.nn.Module, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> list[Tensor]:
    """[Lr] log-prob, entropy and log kept mass of a response's tokens."""
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    logits = model(ids).logits[0, len(prompt_ids) - 1 : -1]
    log_p = (logits / TEMPERATURE).log_softmax(-1)
    at_threshold = (logits / THRESHOLD_TEMPERATURE).softmax(-1)
    kept = at_threshold >= MIN_P * at_threshold.amax(-1, keepdim=True)
    log_prob = log_p.gather(1, torch.tensor(response_ids)[:, None]).squeeze(1)
    return [log_prob, -(log_p.exp() * log_p).sum(-1), log_p.masked_fill(~kept, -torch.inf).logsumexp(-1)]


def samples(model: torch.nn.Module, groups: list[RolloutGroup], seed: int = 0) -> dict[int, Sample]:
    """response id -> Sample: old log-probs near the model's own, so that some ratios are clipped and some are not."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for group in groups:
        for rollout in group.rollouts:
            response = tuple(rollout.response_ids)
            with torch.no_grad():
                log_prob, *_ = statistics(model, group.prompt.token_ids, response)
            noise = 0.4 * torch.randn(len(response), generator=generator)
            advantage = torch.randn(1, generator=generator).expand(len(response))
            found[len(found)] = Sample(group.prompt.token_ids, response, log_prob.float() + noise, advantage)
    return found


def loss(model: torch.nn.Module, batch: list[Sample]) -> Tensor:
    """Mean over every token of the batch: clipped surrogate, entropy bonus, and KL(proxy || policy) = -ln kept mass."""
    total = torch.zeros((), dtype=torch.float64)
    for sample in batch:
        log_prob, entropy, log_kept = statistics(model, sample.prompt_ids, sample.response_ids)
        ratio = (log_prob - sample.old_log_probs).exp()
        gain = torch.minimum(ratio * sample.advantages, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * sample.advantages)
        total = total + (-gain - ENTROPY_WEIGHT * entropy - KEPT_WEIGHT * log_kept).sum()
    return total / sum(len(sample.response_ids) for sample in batch)


def gradients(model: torch.nn.Module, batch: list[Sample]) -> tuple[float, dict[str, Tensor]]:
    """(loss, Hugging Face name -> gradient)."""
    model.zero_grad()
    value = loss(model, batch)
    value.backward()
    return float(value), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
