"""Advantage estimators: pure functions of rewards, chosen by ``algorithm.advantage``.

ESTIMATORS["grpo"](rewards, scored)  ->  advantages, one per response
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

STD_EPS = 1e-6  # GRPO's guard against a group of equal rewards


def group_relative(rewards: Tensor, scored: Tensor, normalize_std: bool = True) -> Tensor:
    """How much better a response did than its siblings: (R - mean_g) / (std_g + 1e-6), or R - mean_g without the std.

    rewards [P, G], scored [P, G] bool -> [P, G] in the dtype of rewards. The std is the unbiased one. A response whose
    verifier failed is not scored: it takes no part in mean and std and its advantage is 0. A group with one scored
    response has nothing to compare it with: mean 0, std 1. DeepSeekMath (arXiv 2402.03300) Sec 4.1; without the std
    Dr.GRPO (arXiv 2503.20783).
    """
    values = torch.where(scored, rewards, 0.0).double()  # the mean of equal rewards has to be that reward
    count = scored.sum(dim=1, keepdim=True)
    alone = count < 2
    mean = torch.where(alone, 0.0, values.sum(dim=1, keepdim=True) / count.clamp(min=1))
    centred = torch.where(scored, values - mean, 0.0)
    if normalize_std:
        variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (torch.where(alone, 1.0, variance.sqrt()) + STD_EPS)
    return centred.to(rewards.dtype)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": partial(group_relative, normalize_std=True),
    "grpo_no_std": partial(group_relative, normalize_std=False),
}
