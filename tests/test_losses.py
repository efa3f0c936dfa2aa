from __future__ import annotations

import math

import pytest
import torch

from megatron_rlvr import losses
from megatron_rlvr.config import KlConfig
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Microbatch, Update


def _grid() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every pairing of a log-ratio with an advantage, none on a corner of a loss."""
    ratios = [1e-6, 0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 2.9, 3.1, 9.9, 10.1, 300.0]
    advantages = [-2.0, -0.5, 0.0, 0.5, 2.0]
    pairs = torch.tensor([(math.log(r), a) for r in ratios for a in advantages], dtype=torch.float64)
    old = torch.linspace(-30, -21, len(pairs), dtype=torch.float64)
    return (old + pairs[:, 0]).requires_grad_(), old, pairs[:, 1]


def _ppo(r: float, a: float, low: float, high: float, dual: float) -> tuple[float, float]:
    """(loss, d loss / d log p) by cases."""
    if a > 0 and r > 1 + high:
        return -a * (1 + high), 0.0
    if a < 0 and r < 1 - low:
        return -a * (1 - low), 0.0
    if a < 0 and dual and r > dual:
        return -a * dual, 0.0
    return -a * r, -a * r


def _plain(r: float, a: float, low: float, high: float, dual: float) -> tuple[float, float]:
    inside = 1 - low < r < 1 + high
    return -a * min(max(r, 1 - low), 1 + high), -a * r if inside else 0.0


def _unclipped(r: float, a: float, low: float, high: float, dual: float) -> tuple[float, float]:
    return -a * r, -a * r


def _filled(old: torch.Tensor, advantages: torch.Tensor) -> Microbatch:
    """One response that is all of these tokens."""
    micro = _micro([len(old) - 1])
    micro.loss_mask = torch.ones(len(old), dtype=torch.bool)
    micro.response_lengths = torch.tensor([len(old)])
    micro.old_log_probs, micro.advantages = old, advantages
    return micro


@pytest.mark.parametrize(
    ("name", "low", "high", "dual", "by_cases"),
    [
        ("ppo", 0.2, 0.2, 0.0, _ppo),
        ("ppo", 0.2, 0.28, 3.0, _ppo),
        ("ppo", 1.0, 9.0, 0.0, _ppo),
        ("plain_clip", 1.0, 9.0, 0.0, _plain),
        ("plain_clip", 0.2, 0.2, 0.0, _plain),
        ("unclipped", 0.2, 0.2, 0.0, _unclipped),
    ],
)
def test_surrogates_value_and_gradient(name, low, high, dual, by_cases):
    log_prob, old, advantages = _grid()
    micro = _filled(old, advantages)
    loss, clipped = losses.LOSSES[name](log_prob, micro, losses.Clip(low, high, dual))
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    pairs = list(zip((log_prob - old).tolist(), advantages.tolist(), strict=True))
    expected = [by_cases(math.exp(x), a, low, high, dual) for x, a in pairs]
    assert torch.allclose(loss, torch.tensor([value for value, _ in expected], dtype=torch.float64), rtol=1e-9)
    assert torch.allclose(gradient, torch.tensor([slope for _, slope in expected], dtype=torch.float64), rtol=1e-9)
    assert clipped.tolist() == [
        not math.isclose(value, -a * math.exp(x)) for (value, _), (x, a) in zip(expected, pairs, strict=True)
    ]


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    log_prob, old, advantages = _grid()
    loss, clipped = losses.LOSSES["cispo"](log_prob, _filled(old, advantages), losses.Clip(1.0, 0.2))
    r = (log_prob - old).exp().detach()
    assert torch.allclose(torch.autograd.grad(loss.sum(), log_prob)[0], -advantages * r.clamp(max=1.2), rtol=1e-9)
    assert torch.equal(clipped, r > 1.2)


@pytest.mark.parametrize("drift", [0.0, 0.1, 6.0])
def test_gspo_is_ppo_on_the_ratio_of_a_whole_response(drift):
    """Value and gradient of mean_i max(-A s_i, -A clip(s_i)), s_i = (p(response) / p_old(response))^(1/length)."""
    generator = torch.Generator().manual_seed(3)
    lengths, clip = [4, 1, 7, 3], losses.Clip(3e-4, 4e-4)
    micro = _micro(lengths)
    total = micro.loss_mask.numel()
    micro.old_log_probs = -5 * torch.rand(total, generator=generator, dtype=torch.float64)
    micro.advantages = micro.per_token(torch.tensor([0.7, -1.2, -0.4, 1.5]))
    moved = drift * torch.randn(total, generator=generator, dtype=torch.float64)
    log_prob = (micro.old_log_probs + moved).requires_grad_()
    update = Update((), sum(lengths), len(lengths))
    weights = losses.reduction_weights(micro, update, "sequence_mean")
    loss = (weights * losses.LOSSES["gspo"](log_prob, micro, clip)[0]).sum()

    expected, start = torch.zeros((), dtype=torch.float64), 0
    for length, advantage in zip(lengths, [0.7, -1.2, -0.4, 1.5], strict=True):
        rows = slice(start, start + length)
        s = (log_prob[rows] - micro.old_log_probs[rows]).mean().clamp(max=10).exp()
        expected = expected + torch.maximum(-advantage * s, -advantage * s.clamp(1 - 3e-4, 1 + 4e-4)) / len(lengths)
        start += length + 1
    assert torch.allclose(loss, expected, rtol=1e-6)
    gradients = [torch.autograd.grad(value, log_prob)[0] for value in (loss, expected)]
    assert torch.allclose(*gradients, rtol=1e-6)
    assert drift or torch.allclose(gradients[0].float(), -weights * micro.advantages)  # s = 1 on the first update


@pytest.mark.parametrize(("moved", "log_s"), [((9.0, 10.0), 9.5), ((9.0, 12.0), 10.0), ((30.0, -30.0), 0.0)])
def test_gspo_cuts_its_ratio_off_at_e_to_the_ten_and_each_tokens_at_twenty(moved, log_s):
    old = torch.full((2,), -40.0, dtype=torch.float64)
    log_prob = (old + torch.tensor(moved)).requires_grad_()
    loss, _ = losses.LOSSES["gspo"](log_prob, _filled(old, -torch.ones(2)), losses.Clip(0.2, 0.2))
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    assert loss.tolist() == pytest.approx([math.exp(log_s)] * 2)
    assert gradient.tolist() == pytest.approx([0.0 if log_s == 10 else math.exp(log_s)] * 2)


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_dppo_stops_at_a_distance_and_not_at_a_ratio(name):
    grid = [0.001, 0.02, 0.1, 0.4, 0.5, 0.7, 0.999, 1.0]
    cases = [(p, old, a) for p in grid for old in grid for a in (-2.0, 0.0, 1.0)]
    p, old, advantages = torch.tensor(cases, dtype=torch.float64).T
    log_prob, low, high = p.log().requires_grad_(), 0.15, 0.25
    loss, clipped = losses.LOSSES[name](log_prob, _filled(old.log(), advantages), losses.Clip(low, high))
    gradient = torch.autograd.grad(loss.sum(), log_prob)[0]
    for place, (new, before, a) in enumerate(cases):
        distance = abs(new - before)
        if name == "dppo_kl":
            rest, rest_before = max(1 - new, 1e-8), max(1 - before, 1e-8)
            distance = before * math.log(before / new) + rest_before * math.log(rest_before / rest)
        stops = (new > before and distance > high) if a > 0 else (new < before and distance > low)
        assert bool(clipped[place]) == stops
        assert float(gradient[place]) == pytest.approx(0.0 if stops else -a * min(new / before, 20.0))


def test_the_ratio_never_overflows():
    log_prob = torch.tensor([-1.0, -200.0, -1.0], requires_grad=True)
    r = losses.ratio(log_prob, torch.tensor([-150.0, -1.0, -1.0]))
    assert r.tolist() == pytest.approx([math.exp(20), math.exp(-20), 1.0], rel=1e-5, abs=0)
    assert torch.equal(torch.autograd.grad(r.sum(), log_prob)[0], torch.tensor([0.0, 0.0, 1.0]))


def _distributions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits, other = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), other.log_softmax(0)


def test_estimators_of_the_kl_by_enumeration():
    logits, log_q = _distributions()
    log_p = logits.log_softmax(0)
    p, kl = log_p.exp(), (log_p.exp() * (log_p - log_q)).sum()
    assert torch.allclose((p * losses.k1(log_p, log_q)).sum(), kl)
    assert torch.allclose((p * losses.k3(log_p, log_q)).sum(), kl)
    assert torch.allclose(losses.k2(log_p, log_q), (log_p - log_q) ** 2 / 2)
    assert (losses.k3(log_p, log_q) >= 0).all()


def test_the_clamp_of_k3_ends_its_gradient():
    """k3 is 10 at a log-ratio of 2.6109: a token further below the reference costs that much, and is not pulled."""
    gaps = torch.tensor([-5.0, 2.61, 2.612, 12.0], dtype=torch.float64)
    old = torch.full_like(gaps, -20.0)
    micro = _filled(old, torch.ones_like(gaps))
    micro.ref_log_probs = old + gaps
    by_hand, slopes = gaps.exp() - gaps - 1, 1 - gaps.exp()
    assert by_hand[3] > 160_000
    for clamp, beyond in ((10.0, by_hand > 10), (0.0, by_hand > math.inf)):
        log_prob, meter = old.clone().requires_grad_(), Meter()
        penalty = losses.kl_penalty(micro, log_prob, KlConfig(0.5, "k3", k3_clamp=clamp), meter)
        expected = torch.where(beyond, 10.0, by_hand)
        assert beyond.sum() in (0, 2) and torch.allclose(penalty, expected / 2)
        (slope,) = torch.autograd.grad(penalty.sum(), log_prob)
        assert torch.allclose(slope, torch.where(beyond, 0.0, slopes / 2))
        assert meter.means()["policy/ref_kl"] == pytest.approx(expected.mean().item())
    for estimator, value in (("k1", -gaps), ("k2", gaps**2 / 2)):
        assert torch.allclose(losses.kl_penalty(micro, old, KlConfig(1.0, estimator), Meter()), value)


def test_expected_gradients_of_the_estimators():
    """Averaged over o ~ p: k3 follows KL(q || p), whose gradient in the logits is p - q; k2 follows KL(p || q)."""
    logits, log_q = _distributions()
    p = logits.softmax(0).detach()
    (k3,) = torch.autograd.grad((p * losses.k3(logits.log_softmax(0), log_q)).sum(), logits)
    assert torch.allclose(k3, p - log_q.exp(), atol=1e-12)
    (k2,) = torch.autograd.grad((p * losses.k2(logits.log_softmax(0), log_q)).sum(), logits)
    log_p = logits.log_softmax(0)
    (reverse,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits)
    assert torch.allclose(k2, reverse, atol=1e-12)


def _micro(lengths: list[int]) -> Microbatch:
    """Responses with one prompt token in front: n loss tokens, then one that predicts nothing."""
    mask = [flag for length in lengths for flag in [True] * length + [False]]
    index = [place for place, length in enumerate(lengths) for _ in range(length + 1)]
    total, ends = len(mask), torch.tensor([0, *(length + 1 for length in lengths)]).cumsum(0)
    return Microbatch(
        token_ids=torch.zeros(total, dtype=torch.int64),
        target_ids=torch.zeros(total, dtype=torch.int64),
        position_ids=torch.zeros(total, dtype=torch.int64),
        loss_mask=torch.tensor(mask),
        response_index=torch.tensor(index),
        rollout_log_probs=torch.zeros(total),
        cu_seqlens=ends.int(),
        response_ids=torch.arange(len(lengths)),
        rewards=torch.zeros(len(lengths)),
        response_lengths=torch.tensor(lengths),
    )


RESPONSES = [4, 1, 0, 7, 2, 3]
UPDATE = Update(microbatches=(), num_tokens=17, num_responses=6)


@pytest.mark.parametrize("split", [[6], [1, 5], [2, 2, 2], [1] * 6])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_the_global_loss_does_not_depend_on_the_microbatches(reduction, split):
    generator = torch.Generator().manual_seed(2)
    per_response = [torch.randn(length, generator=generator).tolist() for length in RESPONSES]
    total, start = 0.0, 0
    for size in split:
        chosen = range(start, start + size)
        micro = _micro([RESPONSES[place] for place in chosen])
        values = torch.tensor([value for place in chosen for value in [*per_response[place], 100.0]])
        total += float((losses.reduction_weights(micro, UPDATE, reduction, 32) * values).sum())
        start += size
    if reduction == "token_mean":
        expected = sum(sum(row) for row in per_response) / 17
    elif reduction == "sequence_sum":
        expected = sum(sum(row) / 32 for row in per_response) / 6
    else:
        expected = sum(sum(row) / len(row) for row in per_response if row) / 6
    assert total == pytest.approx(expected, abs=1e-5)


def test_microbatch_token_mean_weighs_microbatches_by_responses():
    first, second = _micro([4, 2]), _micro([1])
    update = Update(microbatches=(), num_tokens=7, num_responses=3)
    weights = losses.reduction_weights(first, update, "microbatch_token_mean")
    assert torch.allclose(weights, first.loss_mask / 6 * (2 / 3))
    assert torch.allclose(losses.reduction_weights(second, update, "microbatch_token_mean"), torch.tensor([1 / 3, 0.0]))
    assert torch.equal(losses.reduction_weights(_micro([0]), update, "microbatch_token_mean"), torch.zeros(1))
    unscored = losses.reduction_weights(_micro([4, 0, 2]), update, "microbatch_token_mean")
    assert float(unscored.sum()) == pytest.approx(2 / 3)  # two of the update's three, whoever shares the microbatch


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_an_update_without_a_scored_response_has_no_gradient(reduction):
    """As where the only group of an update has a gold answer that no verifier can read."""
    micro, update = _micro([0, 0]), Update(microbatches=(), num_tokens=0, num_responses=0)
    log_prob = torch.zeros(2, requires_grad=True)
    weights = losses.reduction_weights(micro, update, reduction, 32)
    torch.where(micro.loss_mask, weights * log_prob, 0.0).sum().backward()
    assert torch.equal(log_prob.grad, torch.zeros(2))


def test_record_counts_loss_tokens_only():
    micro = _micro([4])
    micro.old_log_probs = torch.full((5,), -3.0)
    micro.advantages = torch.tensor([1.0, 1.0, -1.0, 0.0, 1.0])
    r = torch.tensor([1.0, 2.0, 2.0, 2.0, 50.0])  # only the second is clipped; the last is no loss token
    log_prob = micro.old_log_probs + r.log()
    meter = Meter()
    _, clipped = losses.LOSSES["ppo"](log_prob, micro, losses.Clip(0.2, 0.2))
    losses.record(micro, log_prob, clipped, meter)
    means = meter.means()
    assert means["policy/clip_share"] == pytest.approx(1 / 4)
    assert means["policy/ratio_max"] == pytest.approx(2.0)
    assert means["policy/kl"] == pytest.approx(3 * (2 - 1 - math.log(2)) / 4, abs=1e-6)


def _value_loss(v: float, old: float, target: float, clip: float) -> tuple[float, float]:
    """(loss, d loss / dV) by cases: no gradient where the value, clipped, would be further from its target."""
    near = min(max(v, old - clip), old + clip) if clip else v
    if (near - target) ** 2 > (v - target) ** 2:
        return (near - target) ** 2 / 2, 0.0
    return (v - target) ** 2 / 2, v - target


@pytest.mark.parametrize("clip", [0.0, 0.2, 0.5])
def test_value_loss_value_and_gradient(clip):
    generator = torch.Generator().manual_seed(3)
    old, values = torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)
    values, returns = (old + 0.4 * values).requires_grad_(), torch.randn(40, generator=generator, dtype=torch.float64)
    loss = losses.clipped_value_loss(values, old, returns, clip)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    cases = [
        _value_loss(v, o, r, clip)
        for row, olds, r in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True)
        for v, o in zip(row, olds, strict=True)
    ]
    assert torch.allclose(loss.flatten(), torch.tensor([value for value, _ in cases], dtype=torch.float64))
    assert torch.allclose(gradient.flatten(), torch.tensor([slope for _, slope in cases], dtype=torch.float64))
    assert (gradient == 0).any() == (clip > 0)
