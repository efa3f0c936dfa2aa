"""Every loss and selection once more, in fp64, in one process, from the formulas alone.

Nothing of the package's own maths is used: whole softmaxes instead of sharded statistics, sorted Python lists instead
of collective selections, loops over tokens and responses where that reads like the formula; gradients by autograd.

    tokens = Tokens.of(batch, old_logits, logits)
    loss = token_mean(tokens, ppo(tokens, low=0.2, high=0.28))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from megatron_rlvr.types import Batch


@dataclass
class Tokens:
    """The loss tokens of a batch, one entry each; ``response`` counts from 0, ``place`` is where in its sequence."""

    logits: Tensor  # [n, V] of the current policy, with gradient
    old_logits: Tensor  # [n, V]
    target: Tensor  # [n]
    advantage: Tensor
    rollout: Tensor  # log-prob that the engine sampled with
    response: list[int]
    place: list[int]
    num_responses: int
    mask: Tensor  # [T] which of the batch's tokens these are

    @staticmethod
    def of(batch: Batch, old_logits: Tensor, logits: Tensor) -> Tokens:
        mask = batch.loss_mask
        index = batch.response_index
        place = torch.arange(len(mask)) - batch.cu_seqlens[index].long()
        return Tokens(
            logits[mask].double(),
            old_logits[mask].double(),
            batch.target_ids[mask],
            batch.advantages[mask].double(),
            batch.rollout_log_probs[mask].double(),
            index[mask].tolist(),
            place[mask].tolist(),
            batch.num_responses,
            mask,
        )

    def only(self, responses: range | list[int]) -> Tokens:
        """The tokens of some responses, as one microbatch holds them."""
        chosen = torch.tensor([place for place, response in enumerate(self.response) if response in responses])
        fields = (self.logits, self.old_logits, self.target, self.advantage, self.rollout)
        numbers = ([values[place] for place in chosen.tolist()] for values in (self.response, self.place))
        return Tokens(*(values[chosen] for values in fields), *numbers, len(responses), self.mask)

    @property
    def count(self) -> int:
        return len(self.response)

    def log_p(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(1, self.target[:, None])[:, 0]

    @property
    def new(self) -> Tensor:
        return self.log_p(self.logits)

    @property
    def old(self) -> Tensor:
        return self.log_p(self.old_logits)

    @property
    def ratio(self) -> Tensor:
        return (self.new - self.old).exp()

    @staticmethod
    def entropy(logits: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    def rows(self) -> list[list[int]]:
        """Places of each response's tokens."""
        found: dict[int, list[int]] = {}
        for place, response in enumerate(self.response):
            found.setdefault(response, []).append(place)
        return list(found.values())


# losses [n]


def ppo(t: Tokens, low: float, high: float, dual: float = math.inf) -> Tensor:
    return _ppo(t.ratio, t.advantage, low, high, dual)


def _ppo(r: Tensor, advantage: Tensor, low: float, high: float, dual: float = math.inf) -> Tensor:
    rows = []
    for x, a in zip(r, advantage.tolist(), strict=True):
        worst = torch.maximum(-a * x, -a * x.clamp(1 - low, 1 + high))
        rows.append(torch.minimum(worst, worst.new_tensor(-a * dual)) if a < 0 else worst)
    return torch.stack(rows)


def plain_clip(t: Tokens, low: float, high: float) -> Tensor:
    return -t.advantage * t.ratio.clamp(1 - low, 1 + high)


def unclipped(t: Tokens, low: float, high: float) -> Tensor:
    return -t.advantage * t.ratio


def gspo(t: Tokens, low: float, high: float) -> Tensor:
    """Each token carries its response's loss of s, the geometric mean of the ratios: the mean gives it back."""
    losses = [torch.zeros(())] * t.count
    for row in t.rows():
        s = (t.new[row] - t.old[row]).mean().exp()
        value = _ppo(s[None], t.advantage[row[:1]], low, high)[0]
        for place in row:
            losses[place] = value
    return torch.stack(losses)


def cispo(t: Tokens, low: float, high: float) -> Tensor:
    return -t.ratio.clamp(1 - low, 1 + high).detach() * t.advantage * t.new


def dppo_tv(t: Tokens, low: float, high: float) -> Tensor:
    moved = t.new.exp() - t.old.exp()
    return _dppo(t, [m > high if a > 0 else m < -low for m, a in zip(moved, t.advantage, strict=True)])


def dppo_kl(t: Tokens, low: float, high: float) -> Tensor:
    p, old = t.new.exp(), t.old.exp()
    kl = old * (old / p).log() + (1 - old) * ((1 - old) / (1 - p)).log()
    up = [(p[i] > old[i]) if t.advantage[i] > 0 else (p[i] < old[i]) for i in range(t.count)]
    return _dppo(t, [up[i] and kl[i] > (high if t.advantage[i] > 0 else low) for i in range(t.count)])


def _dppo(t: Tokens, outside: list) -> Tensor:
    keep = torch.tensor([-1.0 * (not flag) for flag in outside], dtype=torch.float64)
    return keep * t.ratio.detach().clamp(max=20) * t.advantage * t.new


# what a method does to losses [n] -> [n]


def covariance(t: Tokens, log_p: Tensor) -> list[float]:
    log_p = log_p.detach()
    return ((t.advantage - t.advantage.mean()) * (log_p - log_p.mean())).tolist()


def kl_cov(t: Tokens, losses: Tensor, share: float, coefficient: float, log_p: Tensor | None = None) -> Tensor:
    values = covariance(t, t.old if log_p is None else log_p)
    highest = sorted(range(t.count), key=values.__getitem__, reverse=True)[: max(1, int(share * t.count))]
    chosen = torch.tensor([place in highest for place in range(t.count)])
    return losses + chosen * coefficient * (t.new - t.old).abs()


def clip_cov(t: Tokens, losses: Tensor, share: float, low: float, high: float, current: bool = False) -> Tensor:
    """Lots are drawn by (seed 0, first update, response), one for each place of its sequence."""
    values = covariance(t, t.new if current else t.old)
    eligible = (losses == -t.advantage * t.ratio).tolist() if current else [True] * t.count
    lots = {}
    for place in range(t.count):
        if low < values[place] < high and eligible[place]:
            draws = numpy.random.default_rng((0, 1, t.response[place])).random(t.place[place] + 1)
            lots[place] = draws[-1]
    dropped = sorted(lots, key=lots.__getitem__)[: max(1, int(share * t.count))]
    return torch.stack([losses[i] * (i not in dropped) for i in range(t.count)])


def high_entropy(t: Tokens, losses: Tensor, share: float, logits: Tensor | None = None) -> Tensor:
    entropies = t.entropy(t.old_logits if logits is None else logits.detach()).tolist()
    highest = sorted(range(t.count), key=entropies.__getitem__, reverse=True)[: max(1, int(share * t.count))]
    return _mean_over(losses, [place in highest for place in range(t.count)])


def stapo(t: Tokens, losses: Tensor, tau: float, quantile: float) -> Tensor:
    entropies = t.entropy(t.old_logits).tolist()
    limit = sorted(entropies)[math.ceil(round(quantile * t.count, 6)) - 1]
    p, a = t.old.exp().tolist(), t.advantage.tolist()
    return _mean_over(losses, [not (a[i] > 0 and p[i] < tau and entropies[i] < limit) for i in range(t.count)])


def _mean_over(losses: Tensor, chosen: list[bool]) -> Tensor:
    """Losses whose mean over all tokens is the mean over the chosen ones."""
    return losses * torch.tensor(chosen) * (len(chosen) / sum(chosen))


def entropy_bonus(t: Tokens, losses: Tensor, coefficient: float) -> Tensor:
    return losses - coefficient * t.entropy(t.logits)


def rollout_correction(t: Tokens, losses: Tensor, form: str, low: float, high: float, renormalise: bool) -> Tensor:
    gap = t.old - t.rollout
    weights = gap.exp().tolist()
    for row in t.rows():
        total = float(gap[row].sum())
        for i in row:
            token = math.exp(float(gap[i]))
            weight = math.exp(total) if form.startswith("sequence") else token
            judged = math.exp(total / len(row)) if form == "geometric_mask" else weight
            if form.endswith("tis"):
                weights[i] = min(max(weight, low), high)
            else:
                weights[i] = weight if low <= judged <= high else 0.0
    losses = losses * torch.tensor(weights, dtype=torch.float64)
    return _mean_over(losses, [weight > 0 for weight in weights]) if renormalise else losses


def lp_reg(
    t: Tokens, losses: Tensor, kappa: float, chosen: Callable[[Tokens, list[bool]], list[int]], strength: Callable
) -> Tensor:
    """k3 to the old policy's proxy on the chosen of the tokens with A < 0 that it keeps; ``strength`` of |A|."""
    q, allowed = proxy(t, kappa)
    on = chosen(t, allowed)
    x = torch.where(torch.tensor(allowed), t.log_p(q.log()), t.new) - t.new
    divergence = x.exp() - x - 1
    pull = [strength(abs(a)) * (i in on) for i, a in enumerate(t.advantage.tolist())]
    return losses + torch.stack([d if s else d.detach() * 0 for d, s in zip(divergence, pull, strict=True)]) * (
        torch.tensor(pull, dtype=torch.float64)
    )


def lp_reg_full(t: Tokens, losses: Tensor, kappa: float, rho: float, beta: float) -> Tensor:
    """Eq 6: KL(q || p) over the vocabulary where A < 0, q(o) > 0 and p_old(o) is among the lowest rho of all tokens."""
    q, allowed = proxy(t, kappa)
    limit = sorted(t.old.tolist())[math.ceil(round(rho * t.count, 6)) - 1]
    on = torch.tensor([allowed[i] and float(t.old[i]) <= limit for i in range(t.count)])
    log_p = t.logits.log_softmax(-1)
    terms = torch.where(q > 0, q * (q.clamp(min=1e-300).log() - log_p), 0.0)
    return losses + beta * torch.where(on, terms.sum(-1), 0.0)


def proxy(t: Tokens, kappa: float) -> tuple[Tensor, list[bool]]:
    """q [n, V] of the old policy, and where A < 0 and q(o) > 0."""
    p = t.old_logits.softmax(-1)
    kept = torch.where(p >= kappa * p.max(-1, keepdim=True).values, p, 0.0)
    is_kept = kept.gather(1, t.target[:, None])[:, 0] > 0
    return kept / kept.sum(-1, keepdim=True), (is_kept & (t.advantage < 0)).tolist()


def lowest(t: Tokens, allowed: list[bool], share_of_all: float) -> list[int]:
    """target_share: the least probable of the allowed tokens, as many as that share of all tokens."""
    old = t.old.tolist()
    ordered = sorted((i for i in range(t.count) if allowed[i]), key=old.__getitem__)
    return ordered[: round(share_of_all * t.count)]


def kl(t: Tokens, losses: Tensor, reference_logits: Tensor, coefficient: float, estimator: str) -> Tensor:
    x = t.new - t.log_p(reference_logits)
    value = {"k1": x, "k2": x**2 / 2, "k3": ((-x).exp() + x - 1).clamp(max=10)}[estimator]
    return losses + coefficient * value


# one number


def token_mean(t: Tokens, losses: Tensor) -> Tensor:
    return losses.sum() / t.count


def sequence_mean(t: Tokens, losses: Tensor) -> Tensor:
    return torch.stack([losses[row].mean() for row in t.rows()]).sum() / t.num_responses


def sequence_sum(t: Tokens, losses: Tensor, length: int) -> Tensor:
    return losses.sum() / (length * t.num_responses)
