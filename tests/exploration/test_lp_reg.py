"""Lp-Reg against references written from the formulas, values and gradients in fp64.

Full-vocabulary sums; the released code, and proxies of other distributions than the policy's, have files of their own.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_rlvr.config import Config as RunConfig
from megatron_rlvr.config import ConfigError, ModelConfig, TrainerConfig
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.vocab import TokenStatistics
from megatron_rlvr.exploration.base import Exploration, Threshold, build
from megatron_rlvr.exploration.lp_reg import DIVERGENCES, PRESETS, Config
from megatron_rlvr.losses import LOSSES, Clip
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Batch
from tests.exploration.toy import (
    VOCAB,
    fill_old,
    fill_rollout,
    make_batch,
    make_logits,
    old_and_current,
    sampled,
    statistics,
    update_loss,
)
from tests.ranks import run_ranks

LENGTHS = [9, 4, 12, 7, 15, 6, 11, 8]
KAPPA = 0.05
CLIP = (1.0, 9.0)  # ratio in [0, 10]


def method(updates_per_rollout: int = 1, dropout: float = 0.0, **options) -> Exploration:
    run = RunConfig(trainer=TrainerConfig(updates_per_rollout=updates_per_rollout), model=ModelConfig(dropout=dropout))
    return build({"lp_reg": {"kappa": KAPPA, **options}}, run)


def paper_objective(
    logits: Tensor, batch: Batch, rho: float, beta: float, divergence: str, proxy_size: int = VOCAB
) -> tuple[Tensor, Tensor]:
    """Minus Eq 6, and its regularised tokens; the divergence is k3 of the sampled token or the KL of "old"/"current".

    Of an old proxy only the ``proxy_size`` most probable tokens take part, the sampled one in the place of the last.
    """
    old = make_logits(batch).softmax(-1)
    mask, advantages = batch.loss_mask, batch.advantages.double()
    p = logits.softmax(-1)
    p_o, old_o = sampled(p, batch), sampled(old, batch)
    keep = old >= KAPPA * old.max(-1, keepdim=True).values
    improbable = sorted(old_o[mask].tolist())[math.ceil(round(rho * int(mask.sum()), 6)) - 1]
    on = mask & (advantages < 0) & (old_o <= improbable) & sampled(keep, batch)
    if divergence == "k3":
        q_o = old_o / torch.where(keep, old, 0.0).sum(-1)
        distance = q_o / p_o - 1 - (q_o / p_o).log()
    else:
        whole = p if divergence == "current" else old
        first = whole.sort(-1, descending=True).indices[:, :proxy_size]
        listed = torch.zeros_like(keep).scatter(1, first, True)
        left_out = sampled(keep, batch) & ~sampled(listed, batch)
        listed[left_out, first[left_out, -1]] = False
        listed[left_out, batch.target_ids[left_out]] = True
        kept = torch.where(keep & listed, whole, 0.0)
        q = (kept / kept.sum(-1, keepdim=True)).detach()
        distance = torch.where(kept > 0, q * (q.clamp(min=1e-300).log() - p.log()), 0.0).sum(-1)
    surrogate = -(p_o / old_o).clamp(0, 10) * advantages
    return (surrogate + beta * torch.where(on, distance, 0.0))[mask].mean(), on


@pytest.mark.parametrize(
    ("updates", "drift", "options", "divergence"),
    [
        (1, 0.0, {}, "current"),
        (1, 0.0, {}, "old"),
        (4, 0.0, {}, "old"),
        (4, 0.6, {}, "old"),
        (1, 0.6, {"dropout": 0.1}, "old"),  # the training forward is of another policy from the first update on
        (4, 0.6, {"proxy_size": 4}, "old"),
        (4, 0.6, {"divergence": "k3_sampled"}, "k3"),
    ],
)
def test_the_papers_objective(updates, drift, options, divergence):
    batch, lp_reg = make_batch(LENGTHS), method(updates, rho=0.3, beta=2.0, **options)
    logits = old_and_current(batch, lp_reg, drift)
    loss, gradient, metrics = update_loss(batch, logits, lp_reg, "plain_clip", CLIP)

    leaf = logits.clone().requires_grad_()
    size = options.get("proxy_size", VOCAB)
    expected, on = paper_objective(leaf, batch, 0.3, 2.0, divergence, size)
    assert int(on.sum()) >= 3
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert torch.allclose(gradient, torch.autograd.grad(expected, leaf)[0], atol=1e-9)
    assert metrics["lp_reg/share"] == pytest.approx(int(on.sum()) / sum(LENGTHS))
    assert metrics["lp_reg/survive_share"] < 1


def test_a_list_too_short_for_the_proxy_still_protects_what_was_sampled():
    """Where the sampled token is not among its most probable ones, leaving it out would push it further down."""
    batch, lp_reg = make_batch(LENGTHS), method(4, kappa=1e-9, rho=0.9, beta=1000.0, proxy_size=3)
    logits = old_and_current(batch, lp_reg, drift=0.0)
    _, gradient, metrics = update_loss(batch, logits, lp_reg, "plain_clip", CLIP)
    last = logits.softmax(-1).argsort(-1, descending=True)[:, 3:]
    is_left_out = batch.loss_mask & (batch.advantages < 0) & (last == batch.target_ids[:, None]).any(-1)
    assert int(is_left_out.sum()) >= 3 and metrics["lp_reg/cut_share"] == 1
    assert (sampled(gradient, batch)[is_left_out] < 0).all()  # descent raises its logit


@pytest.mark.parametrize("preset", ["paper", "released_code"])
def test_one_update_per_rollout_needs_no_pass_of_the_old_policy(preset):
    """Percentile from the rollout, proxy from the training forward: the same loss, gradient and figures."""
    with_pass, without, lp_reg = make_batch(LENGTHS), make_batch(LENGTHS), method(preset=preset, rho=0.3)
    logits = old_and_current(with_pass, lp_reg, drift=0.0)
    fill_rollout(without, logits, lp_reg)
    assert not lp_reg.needs().old_statistics
    loss, gradient, metrics = update_loss(with_pass, logits, lp_reg, "plain_clip", CLIP)
    same_loss, same_gradient, same_metrics = update_loss(without, logits, lp_reg, "plain_clip", CLIP)
    assert metrics["lp_reg/share"] > 0
    assert torch.allclose(loss, same_loss, atol=1e-12) and torch.allclose(gradient, same_gradient, atol=1e-12)
    assert metrics == pytest.approx(same_metrics)


@pytest.mark.parametrize("seed", [0, 1])
def test_full_kl_pulls_towards_the_proxy(seed):
    """Its gradient in the logits is p - q at a regularised token and 0 elsewhere."""
    batch, lp_reg = make_batch(LENGTHS, seed), method(rho=0.3)
    batch.advantages = torch.full((batch.num_tokens,), -1e-12)
    logits = old_and_current(batch, lp_reg, 0.0)
    _, gradient, _ = update_loss(batch, logits, lp_reg, "plain_clip", CLIP)
    _, on = paper_objective(logits, batch, 0.3, 1.0, "current")
    p = logits.softmax(-1)
    kept = torch.where(p >= KAPPA * p.max(-1, keepdim=True).values, p, 0.0)
    expected = torch.where(on[:, None], p - kept / kept.sum(-1, keepdim=True), 0.0) / sum(LENGTHS)
    assert on.any() and torch.allclose(gradient, expected, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"tau": 0.03, "kappa": None}, {"threshold_temperature": 1.0}])
def test_the_proxy_of_the_old_pass_is_that_of_a_second_masked_pass(options):
    temperature, batch, lp_reg = 0.7, make_batch(LENGTHS), method(**options)
    logits = make_logits(batch)
    fill_old(batch, logits, lp_reg, temperature)
    thresholded = (logits / options.get("threshold_temperature", temperature)).softmax(-1)
    least = 0.03 if "tau" in options else KAPPA * thresholded.max(-1, keepdim=True).values
    masked = torch.where(thresholded >= least, logits / temperature, -torch.inf)
    assert torch.allclose(batch.extras["lp_reg/proxy_log_prob"], sampled(masked.log_softmax(-1), batch), atol=1e-12)
    assert batch.extras["lp_reg/proxy_log_prob"].isinf().any()


def _silenced(name: str) -> tuple[Batch, Exploration, float]:
    """(batch, method, scale of the logits) of which nothing is to be regularised."""
    batch = make_batch([3, 3, 3])
    if name == "one token":  # two of nine tokens have to be improbable for the released code
        return batch, method(preset="released_code", rho=0.2), 2.0
    if name == "empty mask":
        batch.loss_mask = torch.zeros_like(batch.loss_mask)
    batch.advantages = batch.advantages.abs() if name == "no negative advantage" else -batch.advantages.abs()
    if name == "zero advantage":
        batch.advantages = torch.zeros_like(batch.advantages)
    if name == "nothing filtered":
        return batch, method(rho=0.5, kappa=1e-9), 2.0
    if name == "tau above every p":
        return batch, method(rho=0.5, kappa=None, tau=0.5), 0.1
    return batch, method(rho=0.5), 2.0


@pytest.mark.parametrize(
    "name",
    ["one token", "empty mask", "no negative advantage", "zero advantage", "nothing filtered", "tau above every p"],
)
def test_where_nothing_is_regularised_the_loss_is_the_surrogate(name):
    batch, lp_reg, scale = _silenced(name)
    logits = make_logits(batch, scale=scale)
    fill_old(batch, logits, lp_reg)
    loss, gradient, metrics = update_loss(batch, logits, lp_reg, "plain_clip", CLIP)
    plain_loss, plain_gradient, _ = update_loss(batch, logits, build({}), "plain_clip", CLIP)
    assert torch.allclose(loss, plain_loss, atol=1e-15)
    assert torch.allclose(gradient, plain_gradient, atol=1e-15)
    if name != "nothing filtered":  # there tokens are regularised, by a divergence of 0
        assert not metrics.get("lp_reg/share")


def test_k3_pulls_at_the_sampled_token_alone_for_its_proxy_stands_still():
    """Its gradient in the logits is (1 - q/p) (1[o] - p); if it flowed through the proxy too, (1/Z - 1) (p - q)."""
    batch, lp_reg = make_batch(LENGTHS), method(rho=0.3, divergence="k3_sampled", proxy_source="current")
    batch.advantages = torch.full((batch.num_tokens,), -1e-12)
    logits = old_and_current(batch, lp_reg, 0.0)
    _, gradient, _ = update_loss(batch, logits, lp_reg, "plain_clip", CLIP)
    _, on = paper_objective(logits, batch, 0.3, 1.0, "current")
    p = logits.softmax(-1)
    kept = torch.where(p >= KAPPA * p.max(-1, keepdim=True).values, p, 0.0)
    z = kept.sum(-1, keepdim=True)
    at_o = torch.zeros_like(p).scatter(1, batch.target_ids[:, None], 1.0)
    detached, through = (1 - 1 / z) * (at_o - p), (1 / z - 1) * (p - kept / z)
    assert on.any() and torch.allclose(gradient, torch.where(on[:, None], detached, 0.0) / sum(LENGTHS), atol=1e-10)
    assert not torch.allclose(detached[on], through[on], atol=1e-3)


def _statistics_at(log_prob: Tensor) -> TokenStatistics:
    zeros = torch.zeros_like(log_prob)
    return TokenStatistics(log_prob, *[zeros] * 6)


@pytest.mark.parametrize(("gap", "clamped", "free"), [(2.60, -12.463738, -12.463738), (2.62, 0.0, -12.735724)])
def test_the_clamp_of_k3_ends_its_gradient(gap, clamped, free):
    """k3 reaches 10 at a log-ratio of 2.6109; the tokens that sank deepest then get no protection at all."""
    for clamp, expected in ((10.0, clamped), (0.0, free)):
        log_prob = torch.tensor([-5.0], dtype=torch.float64, requires_grad=True)
        value, slope = DIVERGENCES["k3_sampled"](_statistics_at(log_prob), log_prob.detach() + gap, clamp)
        assert torch.autograd.grad(value, log_prob)[0].item() == pytest.approx(expected, rel=1e-6)
        assert slope.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gap", [0.4, 19.0, 60.0])
def test_sampled_divergences_report_the_slope_of_their_gradient(gap):
    for name in ("k3_sampled", "k2_sampled"):
        log_prob = torch.tensor([-70.0], dtype=torch.float64, requires_grad=True)
        value, slope = DIVERGENCES[name](_statistics_at(log_prob), log_prob.detach() + gap, 0.0)
        expected = torch.autograd.grad(value, log_prob)[0]
        assert value.isfinite() and (torch.allclose(slope, expected) or (gap > 20 and expected == 0))


def test_on_policy_the_net_coefficient_is_the_penalty_less_the_pull():
    """|A| - beta (1/Z - 1) on every regularised token, for the k3 form."""
    batch, beta = make_batch(LENGTHS), 3.0
    lp_reg = method(rho=0.3, beta=beta, divergence="k3_sampled")
    logits = old_and_current(batch, lp_reg, 0.0)
    _, _, metrics = update_loss(batch, logits, lp_reg, "plain_clip", CLIP)
    _, on = paper_objective(logits, batch, 0.3, beta, "current")
    p = logits.softmax(-1)
    z = torch.where(p >= KAPPA * p.max(-1, keepdim=True).values, p, 0.0).sum(-1)
    net = (batch.advantages.abs().double() - beta * (1 / z - 1))[on]

    current = statistics(logits, batch, lp_reg)
    leaf = current.log_prob.clone().requires_grad_()
    moved = replace(current, log_prob=leaf)
    surrogate = -batch.advantages * (leaf - batch.old_log_probs).exp()
    shaped = lp_reg.policy_loss(surrogate, batch.microbatch(0, len(LENGTHS)), moved, Meter())
    assert torch.allclose(torch.autograd.grad(shaped.sum(), leaf)[0][on], net, atol=1e-9)
    assert metrics["lp_reg/net_coefficient"] == pytest.approx(float(net.mean()), rel=1e-6)
    assert metrics["lp_reg/kept_mass"] == pytest.approx(float(z[on].mean()), rel=1e-6)


def test_the_net_coefficient_knows_where_the_loss_is_clipped():
    """PPO's clip holds A < 0 tokens whose ratio fell below 0.8: there only the pull is left."""
    batch, beta = make_batch(LENGTHS), 3.0
    lp_reg = method(rho=0.3, beta=beta, divergence="k3_sampled")
    logits = old_and_current(batch, lp_reg, 0.5)
    micro, meter = batch.microbatch(0, len(LENGTHS)), Meter()
    current = statistics(logits, batch, lp_reg)
    leaf = current.log_prob.clone().requires_grad_()
    losses, clipped = LOSSES["ppo"](leaf, micro, Clip(0.2, 0.2))
    lp_reg.prepare_update(batch, batch.updates[0], ParallelGroups.single())
    shaped = lp_reg.policy_loss(losses, micro, replace(current, log_prob=leaf), meter)
    on = micro.extras["lp_reg/selected"]
    assert (clipped & on).any() and (on & ~clipped).any()
    wanted = torch.autograd.grad(shaped.sum(), leaf)[0][on].mean()
    assert meter.means()["lp_reg/net_coefficient"] == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("split", [((0, 8),), ((0, 3), (3, 8)), tuple((place, place + 1) for place in range(8))])
@pytest.mark.parametrize("options", [{}, {"divergence": "k2_sampled", "pos_rho": 0.1, "percentile_pool": "neg_tokens"}])
def test_the_paper_preset_does_not_depend_on_microbatches(split, options):
    results = []
    for microbatches in (((0, 8),), split):
        batch, lp_reg = make_batch(LENGTHS, microbatches=microbatches), method(rho=0.3, **options)
        logits = old_and_current(batch, lp_reg, 0.0)
        results.append(update_loss(batch, logits, lp_reg, "plain_clip", CLIP))
    (loss, gradient, metrics), (other_loss, other_gradient, other_metrics) = results
    assert torch.allclose(loss, other_loss, rtol=1e-6) and torch.allclose(gradient, other_gradient, atol=1e-12)
    assert metrics == pytest.approx(other_metrics) and metrics["lp_reg/share"] > 0


def test_the_percentile_is_that_of_all_data_parallel_ranks():
    batch = make_batch(LENGTHS)
    both_sides = {"rho": 0.3, "percentile_pool": "neg_tokens", "pos_rho": 0.2}
    options = [{"rho": 0.3}, both_sides, {"rho": 0.02, "min_two": True}]

    def work(ranks: int):
        groups = ParallelGroups.from_grid(dp=2) if ranks == 2 else ParallelGroups.single()
        start, stop = [(0, 3), (3, 8)][groups.dp_rank] if ranks == 2 else (0, 8)
        totals = []
        for option in options:
            lp_reg = method(**option)
            logits = make_logits(batch)
            fill_old(batch, logits, lp_reg)
            update = batch.updates[0].__class__(((start, stop),), sum(LENGTHS), len(LENGTHS))
            lp_reg.prepare_update(batch, update, groups)
            rows = slice(int(batch.cu_seqlens[start]), int(batch.cu_seqlens[stop]))
            micro = batch.microbatch(start, stop)
            current, meter = statistics(logits[rows].requires_grad_(), micro, lp_reg), Meter()
            lp_reg.policy_loss(0.0 * current.log_prob, micro, current, meter)
            totals.append(meter.sums)
        return totals

    whole = work(1)
    parts = run_ranks(2, work, 2, timeout=60)
    for place, expected in enumerate(whole):
        for name in ("lp_reg/share", "lp_reg/candidates", "lp_reg/divergence", "lp_reg/delta"):
            summed = [sum(part[place][name][item] for part in parts) for item in (0, 1)]
            assert summed == pytest.approx(list(expected[name]))
    assert whole[1]["lp_reg/share"][0] > 0


@pytest.mark.parametrize(
    ("rho", "tokens", "min_two", "count"),
    [
        (0.07, 100, False, 7),  # to the computer 0.07 * 100 is a little more than 7
        (0.07, 101, False, 8),
        (0.01, 3, False, 1),
        (0.01, 299, True, 2),
        (0.01, 200, True, 2),
        (0.01, 199, True, 0),
    ],
)
def test_as_many_tokens_are_improbable_as_the_share_says(rho, tokens, min_two, count):
    batch, lp_reg = make_batch([tokens]), method(rho=rho, min_two=min_two)
    batch.advantages = torch.full((batch.num_tokens,), -1.0)
    logits = old_and_current(batch, lp_reg, 0.0)
    _, _, metrics = update_loss(batch, logits, lp_reg, "plain_clip", CLIP)
    assert metrics["lp_reg/candidates"] * tokens == pytest.approx(count)


def test_metrics_of_one_update():
    batch, lp_reg = make_batch(LENGTHS), method(rho=0.3)
    logits = old_and_current(batch, lp_reg, 0.0)
    _, _, metrics = update_loss(batch, logits, lp_reg, "plain_clip", CLIP)
    p = sampled(logits.softmax(-1), batch)
    delta = sorted(p[batch.loss_mask].tolist())[math.ceil(0.3 * sum(LENGTHS)) - 1]
    candidates = batch.loss_mask & (batch.advantages < 0) & (p <= delta)
    share = metrics["lp_reg/candidates"] * metrics["lp_reg/survive_share"]
    assert metrics["lp_reg/delta"] == pytest.approx(delta)
    assert metrics["lp_reg/candidates"] == pytest.approx(int(candidates.sum()) / sum(LENGTHS))
    assert metrics["lp_reg/share"] == pytest.approx(share)
    assert metrics["lp_reg/divergence"] > 0


def test_the_current_policys_proxy_needs_nothing_stored():
    batch, lp_reg = make_batch(LENGTHS), method(4, proxy_source="current", rho=0.3)
    logits = old_and_current(batch, lp_reg, 0.0)
    assert batch.extras == {}
    loss, _, _ = update_loss(batch, logits, lp_reg, "plain_clip", CLIP)
    expected, _ = paper_objective(logits, batch, 0.3, 1.0, "current")
    assert torch.allclose(loss, expected, rtol=1e-6)


def test_the_old_proxys_tokens_are_kept_only_where_the_full_kl_needs_them():
    assert method(4, proxy_size=7).needs().old_top == 7
    for updates, options in [(1, {}), (4, {"divergence": "k3_sampled"}), (4, {"proxy_source": "current"})]:
        assert method(updates, **options).needs().old_top == 0
    with pytest.raises(ConfigError, match="proxy_size must be at least 1"):
        method(4, proxy_size=0)


@pytest.mark.parametrize("size", [3, VOCAB])
def test_a_proxy_with_more_tokens_than_are_kept_is_counted(size):
    batch, lp_reg = make_batch(LENGTHS), method(4, rho=0.3, proxy_size=size)
    logits = old_and_current(batch, lp_reg, 0.0)
    _, _, metrics = update_loss(batch, logits, lp_reg, "plain_clip", CLIP)
    _, on = paper_objective(logits, batch, 0.3, 1.0, "old")
    p = logits.softmax(-1)
    larger = (p >= KAPPA * p.max(-1, keepdim=True).values).sum(-1) > size
    assert metrics["lp_reg/cut_share"] == pytest.approx(int((larger & on).sum()) / int(on.sum()))
    assert (metrics["lp_reg/cut_share"] > 0) == (size == 3)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.9])
def test_target_share_regularises_that_share_while_there_are_tokens_to(share):
    batch, lp_reg = make_batch(LENGTHS), method(target_share=share)
    logits = old_and_current(batch, lp_reg, 0.0)
    _, _, metrics = update_loss(batch, logits, lp_reg, "plain_clip", CLIP)
    eligible = batch.loss_mask & (batch.advantages < 0) & batch.extras["lp_reg/proxy_log_prob"].isfinite()
    wanted = min(round(share * sum(LENGTHS)), int(eligible.sum()))
    assert metrics["lp_reg/share"] * sum(LENGTHS) == pytest.approx(wanted)


def test_presets_fill_what_is_not_given():
    assert set(PRESETS["paper"]) == set(PRESETS["released_code"])
    for preset, values in PRESETS.items():
        config = Config(preset=preset)
        assert {option: getattr(config, option) for option in values} == values and config.kappa == 0.02
    config = Config(preset="released_code", gate="kept", k3_clamp=0.0, tau=0.1)
    assert (config.gate, config.k3_clamp, config.min_two, config.kappa) == ("kept", 0.0, True, None)
    assert method().needs().threshold == Threshold(min_p=KAPPA, temperature=0.0)
    assert method(preset="released_code", kappa=None, tau=0.1).needs().threshold == Threshold(tau=0.1, temperature=1.0)
