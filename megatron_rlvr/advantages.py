"""Advantage estimators: pure functions of rewards, chosen by ``algorithm.advantage``.

ESTIMATORS["grpo"](rewards, scored)  ->  advantages, one per response
gae(rewards, values, lengths, ...)   ->  advantages, one per token
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


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> Tensor:
    """How much better each token left a response than its critic expected: sum over l of (gamma lam)^l delta_(t+l).

    delta_t = r_t + gamma V(s_t+1) - V(s_t), where V is 0 behind a response's last token. rewards [n] of the tokens and
    values [n] of the states before them, response after response, lengths [S] with sum n -> [n] in the dtype of
    values. Advantages plus values are the returns. GAE (arXiv 1506.02438) Eq 16.
    """
    longest = int(lengths.max())
    filled = torch.arange(longest, device=lengths.device) < lengths[:, None]
    padded = torch.zeros(2, *filled.shape, dtype=torch.float64, device=values.device)
    padded[:, filled] = torch.stack([rewards, values]).double()
    advantages = torch.zeros_like(padded[0])
    later = next_value = padded.new_zeros(lengths.numel())
    for t in reversed(range(longest)):  # padding stands behind the tokens and is worth 0
        reward, value = padded[:, :, t]
        later = reward + gamma * next_value - value + gamma * lam * later
        advantages[:, t], next_value = later, value
    return advantages[filled].to(values.dtype)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": partial(group_relative, normalize_std=True),
    "grpo_no_std": partial(group_relative, normalize_std=False),
}
