"""Advantage estimators: pure functions of rewards, chosen by ``algorithm.advantage``.

ESTIMATORS["grpo"](rewards, scored)  ->  advantages, one per response
gae(rewards, values, lengths, ...)   ->  advantages, one per token

rewards [P, G], scored [P, G] bool -> [P, G] in the dtype of rewards. A response whose verifier failed is not scored:
its siblings' advantages are as if it were not there, and its own is 0.

What is more than a baseline for the reward is settings: REINFORCE++ is ``reinforce`` with ``whiten``, its baseline form
``grpo_no_std`` with ``whiten``, Dr.GRPO ``grpo_no_std`` with ``reduction: sequence_sum``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_rlvr.types import Microbatch

STD_EPS = 1e-6  # GRPO's guard against a group of equal rewards


def group_relative(rewards: Tensor, scored: Tensor, normalize_std: bool = True) -> Tensor:
    """How much better a response did than its siblings: (R - mean_g) / (std_g + 1e-6), or R - mean_g without the std.

    The std is the unbiased one. A group with one scored response has nothing to compare it with: mean 0, std 1.
    DeepSeekMath (arXiv 2402.03300) Sec 4.1; without the std Dr.GRPO (arXiv 2503.20783).
    """
    centred, count = _centred(rewards, scored)
    if normalize_std:
        variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (torch.where(count < 2, 1.0, variance.sqrt()) + STD_EPS)
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


def leave_one_out(rewards: Tensor, scored: Tensor) -> Tensor:
    """RLOO: the reward less the mean of the *others*, which is n / (n - 1) (R - mean_g) for n scored responses.

    The baseline does not depend on the response, so the gradient is unbiased. Alone, A = R. arXiv 2402.14740.
    """
    centred, count = _centred(rewards, scored)
    return (centred * (count / (count - 1).clamp(min=1))).to(rewards.dtype)


def plain(rewards: Tensor, scored: Tensor) -> Tensor:
    """REINFORCE: A = R, no baseline."""
    return torch.where(scored, rewards, 0.0)


def _centred(rewards: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """R - mean_g [P, G] in fp64, 0 where not scored and R itself where alone; and how many are scored [P, 1]."""
    values = torch.where(scored, rewards, 0.0).double()  # the mean of equal rewards has to be that reward
    count = scored.sum(dim=1, keepdim=True)
    mean = torch.where(count < 2, 0.0, values.sum(dim=1, keepdim=True) / count.clamp(min=1))
    return torch.where(scored, values - mean, 0.0), count


def sum_before(values: Tensor, batch: Microbatch) -> Tensor:
    """[T] of the loss tokens -> [T]: what those in front of a token in its response add up to."""
    masked = torch.where(batch.loss_mask, values, 0.0).double()
    before = masked.cumsum(0) - masked
    starts = before[batch.cu_seqlens[:-1].long()]
    return (before - batch.per_token(starts)).to(values.dtype)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": partial(group_relative, normalize_std=True),
    "grpo_no_std": partial(group_relative, normalize_std=False),
    "rloo": leave_one_out,
    "reinforce": plain,
}
