"""Lp-Reg's released code against a loop over tokens with a second, masked pass: tokens, gate, loss and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_rlvr import losses as policy_losses
from megatron_rlvr.config import Config, TrainerConfig
from megatron_rlvr.exploration.base import Exploration, build
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Batch
from tests.exploration.toy import fill_old, make_batch, make_logits, old_and_current, sampled, statistics, update_loss

LENGTHS = [9, 4, 12, 7, 15, 6, 11, 8]
KAPPA = 0.05
CLIP = (1.0, 9.0)  # ratio in [0, 10]


def method(updates_per_rollout: int = 1) -> Exploration:
    run = Config(trainer=TrainerConfig(updates_per_rollout=updates_per_rollout))
    return build({"lp_reg": {"preset": "released_code", "kappa": KAPPA, "rho": 0.4}}, run)


def released_code(logits: Tensor, batch: Batch, rho: float) -> tuple[Tensor, list[int]]:
    """The steps of the released loss over one microbatch, token by token -> token-mean loss, regularised places."""
    old_logits = make_logits(batch)
    old_p = old_logits.softmax(-1)
    masked = torch.where(old_p >= KAPPA * old_p.max(-1, keepdim=True).values, old_logits, -1e4)
    proxy = sampled(masked.log_softmax(-1), batch).tolist()  # the second forward pass, with filtered logits
    old = sampled(old_logits.log_softmax(-1), batch).tolist()
    new = sampled(logits.log_softmax(-1), batch)
    places = [place for place, valid in enumerate(batch.loss_mask.tolist()) if valid]

    negative = sorted((place for place in places if batch.advantages[place] < 0), key=new.tolist().__getitem__)
    k = max(1, int(len(negative) * rho))
    chosen = [place for place in (negative[:k] if k > 1 else []) if new.tolist()[place] < proxy[place]]
    total = torch.zeros((), dtype=torch.float64)
    for place in places:
        a, r = batch.advantages[place].double(), (new[place] - old[place]).exp()
        if place in chosen:
            x = proxy[place] - new[place]
            total = total - a * r + (x.exp() - x - 1).clamp(-10, 10)
        else:
            total = total + torch.maximum(-a * r, -a * r.clamp(0, 10))
    return total / len(places), chosen


@pytest.mark.parametrize("drift", [0.0, 0.3, 3.0])
def test_the_released_code_on_one_microbatch(drift):
    batch, lp_reg = make_batch(LENGTHS), method(4)
    logits = old_and_current(batch, lp_reg, drift)
    loss, gradient, metrics = update_loss(batch, logits, lp_reg, "ppo", CLIP, "microbatch_token_mean")

    leaf = logits.clone().requires_grad_()
    expected, chosen = released_code(leaf, batch, 0.4)
    assert len(chosen) >= 3 and metrics["lp_reg/share"] == pytest.approx(len(chosen) / sum(LENGTHS))
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert torch.allclose(gradient, torch.autograd.grad(expected, leaf)[0], atol=1e-9)
    micro = batch.microbatch(0, len(LENGTHS))
    current = statistics(leaf, micro, lp_reg)
    surrogate, _ = policy_losses.clipped_surrogate(current.log_prob, micro, policy_losses.Clip(*CLIP))
    replaced = (lp_reg.policy_loss(surrogate, micro, current, Meter()) - surrogate).abs() > 1e-9
    assert replaced.nonzero()[:, 0].tolist() == sorted(chosen)  # those entries and no others


def test_the_released_code_takes_each_microbatch_by_itself():
    split = ((0, 3), (3, 8))
    batch, lp_reg = make_batch(LENGTHS, microbatches=split), method()
    logits = old_and_current(batch, lp_reg, 0.0)
    loss, _, _ = update_loss(batch, logits, lp_reg, "ppo", CLIP, "microbatch_token_mean")
    total = 0.0
    for start, stop in split:
        rows = slice(int(batch.cu_seqlens[start]), int(batch.cu_seqlens[stop]))
        for_this = torch.zeros_like(batch.loss_mask)
        for_this[rows] = True
        alone = make_batch(LENGTHS)
        alone.loss_mask = alone.loss_mask & for_this
        total += float(released_code(logits, alone, 0.4)[0]) * (stop - start) / len(LENGTHS)
    assert float(loss) == pytest.approx(total, rel=1e-6)
    whole, same = make_batch(LENGTHS), method()
    fill_old(whole, logits, same)
    other, _, _ = update_loss(whole, logits, same, "ppo", CLIP, "microbatch_token_mean")
    assert float(other) != pytest.approx(total, rel=1e-3)  # so it depends on how the responses are packed
