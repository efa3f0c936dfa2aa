from __future__ import annotations

import pytest
import torch

from megatron_rlvr.exploration.base import build
from tests.exploration.toy import fill_old, make_batch, make_logits, update_loss


def test_value_and_gradient():
    method, batch = build({"entropy_bonus": {"coefficient": 0.3}}), make_batch([4, 1, 6])
    logits = make_logits(batch)
    fill_old(batch, logits, method)
    loss, gradient, metrics = update_loss(batch, logits, method, "ppo", (0.2, 0.2))

    leaf, mask = logits.clone().requires_grad_(), batch.loss_mask
    log_p = leaf.log_softmax(-1)
    own = log_p.gather(1, batch.target_ids[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    per_token = -batch.advantages * (own - own.detach()).exp() - 0.3 * entropy
    expected = per_token[mask].mean()
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    assert torch.allclose(loss, expected, atol=1e-5)
    assert torch.allclose(gradient, expected_gradient, atol=1e-5)
    assert metrics == {"entropy_bonus/bonus": pytest.approx(0.3 * float(entropy.detach()[mask].mean()), rel=1e-4)}
    assert not method.needs().old_statistics


def test_it_raises_the_entropy():
    method, batch = build({"entropy_bonus": {"coefficient": 1.0}}), make_batch([5])
    batch.advantages = torch.zeros(batch.num_tokens)
    logits = make_logits(batch)
    fill_old(batch, logits, method)
    _, gradient, before = update_loss(batch, logits, method, "ppo", (0.2, 0.2))
    _, _, after = update_loss(batch, logits - gradient, method, "ppo", (0.2, 0.2))
    assert after["entropy_bonus/bonus"] > before["entropy_bonus/bonus"]
