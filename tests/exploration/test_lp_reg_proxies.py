"""Lp-Reg with a proxy of another distribution than the policy's own: the reference's, the rollout engine's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_rlvr.config import Config as RunConfig
from megatron_rlvr.config import ConfigError, TrainerConfig
from megatron_rlvr.exploration.base import Exploration, Needs, build
from megatron_rlvr.types import Batch
from tests.exploration.toy import fill_old, make_batch, make_logits, sampled, statistics, update_loss

LENGTHS = [9, 4, 12, 7, 15, 6, 11, 8]
KAPPA = 0.05
CLIP = (1.0, 9.0)  # ratio in [0, 10]


def method(updates_per_rollout: int = 1, **options) -> Exploration:
    run = RunConfig(trainer=TrainerConfig(updates_per_rollout=updates_per_rollout))
    return build({"lp_reg": {"kappa": KAPPA, **options}}, run)


def test_a_proxy_of_the_reference_policy():
    """The part of another model: only its scalars are known, so k3 of the sampled token has to take the KL's place."""
    with pytest.raises(ConfigError, match="set exploration.lp_reg.divergence=k3_sampled"):
        method(1, proxy_source="reference")
    lp_reg = method(1, proxy_source="reference", divergence="k3_sampled", rho=0.3)
    assert lp_reg.needs().reference and lp_reg.needs().old_statistics
    batch = make_batch(LENGTHS)
    logits, reference_logits = make_logits(batch), make_logits(batch, seed=5)
    fill_old(batch, logits, lp_reg, reference=reference_logits)
    reference = statistics(reference_logits, batch, lp_reg)
    assert torch.equal(batch.extras["lp_reg/proxy_log_prob"], reference.proxy_log_prob)
    loss, _, metrics = update_loss(batch, logits, lp_reg, "plain_clip", CLIP)

    p_o, q_o = sampled(logits.softmax(-1), batch), reference.proxy_log_prob.exp()
    improbable = sorted(p_o[batch.loss_mask].tolist())[math.ceil(0.3 * sum(LENGTHS)) - 1]
    on = batch.loss_mask & (batch.advantages < 0) & (p_o <= improbable) & (q_o > 0)
    divergence = torch.where(on, q_o / p_o - 1 - (q_o / p_o).log(), 0.0)
    assert torch.allclose(loss, (divergence - batch.advantages)[batch.loss_mask].mean(), rtol=1e-6) and on.sum() >= 3
    assert metrics["lp_reg/share"] == pytest.approx(int(on.sum()) / sum(LENGTHS))


def engine_says(lp_reg: Exploration, logits: Tensor, batch: Batch, temperature: float) -> dict[str, list[float]]:
    """What the method keeps of the engine's ``proxy_size`` most probable tokens, with the sampled one among them."""
    (only,) = lp_reg.methods  # type: ignore[attr-defined]
    log_p = (logits / temperature).log_softmax(-1)
    drawn, ordered = sampled(log_p, batch).tolist(), log_p.sort(-1, descending=True).values.tolist()
    most = [row[: only.config.proxy_size] for row in ordered]
    return lp_reg.annotate_sample(drawn, [row + [one] * (one < row[-1]) for one, row in zip(drawn, most, strict=True)])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "options", [{}, {"threshold_temperature": 1.0}, {"tau": 0.03, "kappa": None}, {"proxy_size": 9}]
)
def test_the_engines_proxy_is_that_of_the_same_distribution(options, temperature):
    """From its most probable tokens alone, exactly where the least of them is filtered."""
    run = RunConfig(trainer=TrainerConfig(updates_per_rollout=4))
    run.rollout.temperature = temperature
    settings = {"kappa": 0.2, "divergence": "k3_sampled", "rho": 0.3} | options
    lp_reg = build({"lp_reg": settings | {"proxy_source": "rollout"}}, run)
    assert lp_reg.needs() == Needs(rollout_top=options.get("proxy_size", 128))
    batch = make_batch(LENGTHS)
    logits = make_logits(batch, scale=2.0)
    found = engine_says(lp_reg, logits, batch, temperature)
    of_policy = statistics(logits, batch, build({"lp_reg": settings}, run), temperature)
    assert not any(found["lp_reg/cut"])
    for name, wanted in (("proxy_log_prob", of_policy.proxy_log_prob), ("log_kept_mass", of_policy.log_kept_mass)):
        assert torch.allclose(torch.tensor(found[f"lp_reg/{name}"], dtype=torch.float64), wanted, atol=1e-9)
    assert of_policy.proxy_log_prob.isinf().any() and of_policy.log_kept_mass.min() < -0.01


def test_an_engines_proxy_that_is_cut_says_so():
    lp_reg = method(proxy_source="rollout", divergence="k3_sampled", proxy_size=2)
    ln = [math.log(p) for p in (0.4, 0.3, 0.2)]
    found = lp_reg.annotate_sample([ln[0], ln[2], -0.01], [ln[:2], ln, [-0.01, -4.6]])
    assert found["lp_reg/cut"] == [1.0, 1.0, 0.0]  # of the third the second token is filtered
    assert found["lp_reg/log_kept_mass"] == pytest.approx([math.log(0.7), math.log(0.9), -0.01])
    assert found["lp_reg/proxy_log_prob"] == pytest.approx([math.log(4 / 7), math.log(2 / 9), 0.0])


def test_a_proxy_of_the_rollout_engine():
    """Another distribution than the old policy's, by as much as two programs differ and more."""
    with pytest.raises(ConfigError, match="proxy_source=rollout keeps only scalars.*divergence=k3_sampled"):
        method(1, proxy_source="rollout")
    with pytest.raises(ConfigError, match="tau is one at threshold_temperature=0.5"):
        method(proxy_source="rollout", divergence="k3_sampled", kappa=None, tau=0.1, threshold_temperature=0.5)
    lp_reg = method(4, proxy_source="rollout", divergence="k3_sampled", rho=0.3)
    batch = make_batch(LENGTHS)
    logits, engine_logits = make_logits(batch), make_logits(batch) + 0.3 * make_logits(batch, seed=5)
    batch.extras = {name: torch.tensor(row) for name, row in engine_says(lp_reg, engine_logits, batch, 1.0).items()}
    kept = dict(batch.extras)
    batch.old_log_probs = sampled(logits.log_softmax(-1), batch)
    loss, _, metrics = update_loss(batch, logits, lp_reg, "plain_clip", CLIP)
    assert batch.extras == kept and lp_reg.annotate(batch, statistics(logits, batch, lp_reg)) == {}

    p, engine = sampled(logits.softmax(-1), batch), engine_logits.softmax(-1)
    keep = engine >= KAPPA * engine.max(-1, keepdim=True).values
    q = sampled(engine, batch) / torch.where(keep, engine, 0.0).sum(-1)
    improbable = sorted(p[batch.loss_mask].tolist())[math.ceil(0.3 * sum(LENGTHS)) - 1]
    on = batch.loss_mask & (batch.advantages < 0) & (p <= improbable) & sampled(keep, batch)
    divergence = torch.where(on, q / p - 1 - (q / p).log(), 0.0)
    assert torch.allclose(loss, (divergence - batch.advantages)[batch.loss_mask].mean(), rtol=1e-5) and on.sum() >= 3
    assert metrics["lp_reg/share"] == pytest.approx(int(on.sum()) / sum(LENGTHS)) and metrics["lp_reg/cut_share"] == 0
