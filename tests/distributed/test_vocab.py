"""Token statistics: values and gradients against an unsharded fp64 softmax written another way, on 1 to 8 ranks.

What these tests do not show: NCCL, and speed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlvr import platform
from megatron_rlvr.config import ConfigError
from megatron_rlvr.distributed import vocab_formulas, vocab_passes
from megatron_rlvr.distributed.vocab import StatisticsOptions, TokenStatistics, token_statistics
from tests.ranks import run_ranks

FIELDS = ("log_prob", "entropy", "max_log_prob", "sum_squares", "log_kept_mass", "proxy_log_prob", "rank")
DIFFERENTIABLE = ("log_prob", "entropy", "log_kept_mass")
TOP_FIELDS = ("top_ids", "top_log_probs", "top_cut")
OPTIONS = [
    StatisticsOptions(),
    StatisticsOptions(temperature=0.7),
    StatisticsOptions(min_p=0.02),
    StatisticsOptions(min_p=0.3, temperature=0.6),
    StatisticsOptions(min_p=0.1, temperature=1.7, threshold_temperature=1.7),
    StatisticsOptions(min_p=1.0),
    StatisticsOptions(tau=0.02),
    StatisticsOptions(tau=0.05, temperature=0.7),
    StatisticsOptions(tau=0.1, temperature=1.3, threshold_temperature=1.3),
    StatisticsOptions(tau=0.9),
]


def kept_set(z: Tensor, options: StatisticsOptions) -> Tensor:
    """[T, V] bool, from fp64 logits."""
    p = torch.softmax(z / options.threshold_temperature, dim=1)
    if options.min_p is not None:
        return p >= options.min_p * p.max(dim=1, keepdim=True).values * (1 - 1e-9)
    return p >= (options.tau or 0.0) * (1 - 1e-9)


def reference(logits: Tensor, targets: Tensor, options: StatisticsOptions) -> dict[str, Tensor]:
    """Whole [T, V] fp64 logits, plain softmax and autograd. The kept set is constant, as a threshold is flat."""
    z = logits.double()
    log_p = torch.log_softmax(z / options.temperature, dim=1)
    p = log_p.exp()
    keep = kept_set(z.detach(), options)
    nothing = ~keep.any(dim=1, keepdim=True)
    keep = keep | nothing  # nothing kept: no truncation ...
    mass = torch.where(keep, p, 0.0).sum(dim=1)
    log_q = torch.where(keep & ~nothing, log_p - mass.log()[:, None], -torch.inf)  # ... and no target survives
    at_target = targets[:, None]
    return {
        "log_prob": log_p.gather(1, at_target)[:, 0],
        "entropy": -torch.where(p > 0, p * log_p.masked_fill(p == 0, 0.0), 0.0).sum(1),
        "max_log_prob": log_p.max(1).values,
        "sum_squares": p.square().sum(1),
        "log_kept_mass": mass.log(),
        "proxy_log_prob": log_q.gather(1, at_target)[:, 0],
        "rank": 1 + (z > z.gather(1, at_target)).double().sum(1),
    }


def old_reference(
    old: Tensor, current: Tensor, targets: Tensor, options: StatisticsOptions, top: int
) -> dict[str, Tensor]:
    """The ``top`` most probable kept tokens of the [T, V] logits ``old``, and the KL of their share to ``current``.

    The target is one of them where it is kept.
    """
    log_p = torch.log_softmax(old / options.temperature, dim=1)
    kept = log_p.masked_fill(~(kept_set(old, options) & log_p.isfinite()), -torch.inf)
    ordered, ids = kept.sort(dim=1, descending=True)
    ordered = torch.nn.functional.pad(ordered, (0, top + 1), value=-torch.inf)
    ids = torch.nn.functional.pad(ids, (0, top), value=-1)[:, :top].masked_fill(ordered[:, :top].isinf(), -1)
    for row, target in enumerate(targets.tolist()):
        if kept[row, target].isfinite() and target not in ids[row].tolist():
            ids[row, -1], ordered[row, top - 1] = target, kept[row, target]
    q = torch.softmax(ordered[:, :top], dim=1).nan_to_num(0.0)
    log_now = torch.log_softmax(current / options.temperature, dim=1).gather(1, ids.clamp(min=0))
    kl = torch.where(q > 0, q * (q.clamp(min=1e-300).log() - log_now), 0.0).sum(1)
    return {"old_kl": kl, "top_ids": ids, "top_log_probs": ordered[:, :top], "top_cut": ordered[:, top] > -torch.inf}


class Case(NamedTuple):
    logits: Tensor  # [T, vocab_size] fp64
    targets: Tensor
    upstream: Tensor  # [4, T]: gradients of log_prob, entropy, log_kept_mass, old_kl
    padded: int  # columns over all ranks
    options: StatisticsOptions
    old: Tensor  # [T, vocab_size] fp64, of the older policy, no two alike in a row
    top: int  # 0: the older policy is left out

    @property
    def fields(self) -> tuple[str, ...]:
        return (*FIELDS, "old_kl") if self.top else FIELDS


def make_case(
    seed: int,
    tokens: int,
    vocab: int,
    padded: int,
    options: StatisticsOptions,
    holes: bool = False,
    top: int = 0,
    spread: float = 3.0,
) -> Case:
    """Random logits with ties; where ``holes``, -inf columns; targets on every rank, then anywhere, never in a hole."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) * spread).round(decimals=1)
    logits[::2] *= 0.1  # flat rows, where a fixed threshold may keep nothing
    old = -0.25 * torch.rand(tokens, vocab, generator=generator).argsort(1).double()  # exact in bf16 too
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[: min(tokens, vocab)] = torch.linspace(0, vocab - 1, min(tokens, vocab)).long()
    if holes:
        hole = torch.rand(tokens, vocab, generator=generator) < 0.3
        hole.scatter_(1, targets[:, None], False)
        logits[hole] = -torch.inf
        old[hole] = -torch.inf
    upstream = torch.randn(4, tokens, generator=generator, dtype=torch.float64)
    return Case(logits, targets, upstream, padded, options, old, top)


def own_columns(logits: Tensor, padded: int, dtype: torch.dtype) -> Tensor:
    """This rank's columns; the padding holds garbage that would win every maximum."""
    padding = torch.full((logits.shape[0], padded - logits.shape[1]), 1e4, dtype=torch.float64)
    columns = padded // dist.get_world_size()
    whole = torch.cat([logits, padding], dim=1).to(dtype)
    return whole[:, dist.get_rank() * columns :][:, :columns].clone()


def weighted(values: dict[str, Tensor], case: Case) -> Tensor:
    statistics = torch.stack([values[name] for name in (*DIFFERENTIABLE, "old_kl") if name in values])
    return (case.upstream[: len(statistics)].to(statistics.dtype) * statistics).sum()


def sharded(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """(statistics, gradient of this rank's columns) of sum_i upstream_i * statistic_i."""
    shared = {
        "group": dist.group.WORLD if dist.get_world_size() > 1 else None,
        "vocab_size": case.logits.shape[1],
        **vars(case.options),
    }
    tops, old_top = {}, None
    if case.top:
        before = token_statistics(own_columns(case.old, case.padded, dtype), case.targets, **shared | {"top": case.top})
        tops, old_top = {name: getattr(before, name) for name in TOP_FIELDS}, (before.top_ids, before.top_log_probs)
    logits = own_columns(case.logits, case.padded, dtype).requires_grad_()
    found = token_statistics(logits, case.targets, old_top=old_top, **shared)
    values = {name: getattr(found, name) for name in case.fields}
    weighted(values, case).backward()
    return {name: value.detach() for name, value in (values | tops).items()}, logits.grad


def expected(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The same from the reference, at the logits that ``dtype`` can hold; padded columns get no gradient."""
    whole = case.logits.to(dtype).double().clone().requires_grad_()
    values = reference(whole, case.targets, case.options)
    if case.top:
        values |= old_reference(case.old.to(dtype).double(), whole, case.targets, case.options, case.top)
    (gradient,) = torch.autograd.grad(weighted(values, case), whole)
    padding = gradient.new_zeros(gradient.shape[0], case.padded - gradient.shape[1])
    return {name: value.detach() for name, value in values.items()}, torch.cat([gradient, padding], dim=1)


VALUE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2e-6}  # times 1 + |value|
ENTRY = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}  # times 1 + |entry| of the gradient
NORM = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-4}  # of it whole, beside the dtype's rounding


def check(cases: list[Case], dtype: torch.dtype, world_size: int) -> None:
    def work():
        return [sharded(case, dtype) for case in cases]

    results = run_ranks(world_size, work, timeout=120)
    for index, case in enumerate(cases):
        values, gradient = expected(case, dtype)
        for found, _ in (result[index] for result in results):
            for name in TOP_FIELDS if case.top else ():
                close = VALUE[dtype] if found[name].is_floating_point() else 0.0
                wanted = values[name].to(found[name].dtype)
                torch.testing.assert_close(found[name], wanted, rtol=close, atol=close)
            for name in case.fields:
                assert found[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                torch.testing.assert_close(found[name].double(), values[name], rtol=VALUE[dtype], atol=VALUE[dtype])
        whole = torch.cat([result[index][1] for result in results], dim=1)
        assert whole.dtype == dtype
        torch.testing.assert_close(whole.double(), gradient, rtol=ENTRY[dtype], atol=ENTRY[dtype])
        rounding = (gradient.to(dtype).double() - gradient).norm()
        size = gradient.norm() + case.upstream.norm()  # the second where terms cancel: one column has no gradient
        assert (whole.double() - gradient).norm() <= rounding + NORM[dtype] * size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size, vocab, padded", [(1, 37, 37), (2, 37, 40), (4, 33, 48), (4, 9, 16)])
def test_values_and_gradients_equal_the_unsharded_reference(
    world_size: int, vocab: int, padded: int, dtype: torch.dtype
):
    cases = [
        make_case(seed, 14, vocab, padded, options, holes=seed % 2 == 1, top=[0, 5, 40, 1][seed % 4])
        for seed, options in enumerate(OPTIONS)
    ]
    check(cases, dtype, world_size)


def test_the_threshold_has_its_own_temperature():
    flat = StatisticsOptions(temperature=0.5, threshold_temperature=2.0, min_p=0.3)
    case = make_case(3, 12, 24, 24, flat)
    assert expected(case, torch.float64)[0]["log_kept_mass"].min() < -1e-3  # the threshold really cuts
    sharp = make_case(3, 12, 24, 24, StatisticsOptions(temperature=0.5, threshold_temperature=0.5, min_p=0.3))
    masses = [expected(each, torch.float64)[0]["log_kept_mass"] for each in (case, sharp)]
    assert not torch.allclose(*masses)  # and the two thresholds differ
    fixed = make_case(3, 12, 24, 24, StatisticsOptions(temperature=0.5, threshold_temperature=2.0, tau=0.06))
    check([case, sharp, fixed], torch.float64, 2)


seeds, tokens, vocabularies, paddings = st.integers(0, 2**16), st.integers(0, 6), st.integers(1, 40), st.integers(0, 9)
temperatures = {name: st.floats(0.6, 1.5) for name in ("temperature", "threshold_temperature")}
any_min_p = st.builds(StatisticsOptions, min_p=st.floats(-8, 0).map(lambda power: 10.0**power), **temperatures)
any_options = st.sampled_from(OPTIONS) | any_min_p
spreads = st.sampled_from([0.0, 3.0, 1e4])  # rows of equal logits; usual ones; all but one column at p = 0
shapes = st.tuples(seeds, tokens, vocabularies, paddings, any_options, st.booleans(), st.integers(0, 9), spreads)


ANY_DTYPE = [(1, torch.float32), (2, torch.float32), (2, torch.float64), (4, torch.float64), (8, torch.float32)]


@pytest.mark.parametrize(("world_size", "dtype"), ANY_DTYPE)
def test_any_shape(world_size: int, dtype: torch.dtype):
    """hypothesis draws the cases; all of them run on one start of the ranks."""
    cases: list[Case] = []

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(shapes)
    def draw(shape: tuple):
        seed, tokens, vocab, extra, options, holes, top, spread = shape
        padded = -(-(vocab + extra) // world_size) * world_size
        cases.append(make_case(seed, tokens, vocab, padded, options, holes, top, spread))

    draw()
    assert len(cases) >= 40 and any(case.targets.numel() == 0 for case in cases)
    check(cases, dtype, world_size)


def test_min_p_takes_two_collectives_tau_or_a_top_three_and_the_backward_none():
    kinds = ("all_", "broadcast", "reduce", "gather", "scatter", "barrier", "send", "recv", "isend", "irecv")
    names = [name for name in dir(dist) if name.startswith(kinds)]

    def work():
        counts = []
        for options in [*OPTIONS, StatisticsOptions(min_p=0.1, top=3)]:
            logits, targets = torch.randn(5, 8, requires_grad=True), torch.arange(5)
            calls: list[str] = []
            with pytest.MonkeyPatch.context() as patch:
                for name in (name for name in names if callable(getattr(dist, name))):
                    original = getattr(dist, name)
                    patch.setattr(
                        dist, name, lambda *a, f=original, n=name, to=calls, **k: (to.append(n), f(*a, **k))[1]
                    )
                found = token_statistics(logits, targets, group=dist.group.WORLD, **vars(options))
                forward = len(calls)
                (found.log_prob + found.entropy + found.log_kept_mass).sum().backward()
                counts.append((forward, len(calls) - forward))
        return counts

    for counts in run_ranks(2, work):
        assert counts == [(3 if options.tau is not None else 2, 0) for options in OPTIONS] + [(3, 0)]


def test_ties_are_all_kept():
    logits = torch.tensor([[2.0, 2.0, 2.0, -3.0, 2.0 + math.log(0.5), -9.0]], dtype=torch.float64)
    top = token_statistics(logits, torch.tensor([1]), min_p=1.0)
    assert top.proxy_log_prob.item() == pytest.approx(-math.log(3))
    half = token_statistics(logits, torch.tensor([4]), min_p=0.5 * (1 - 1e-12))
    assert half.proxy_log_prob.item() == pytest.approx(math.log(0.5 / 3.5))
    uniform = token_statistics(torch.zeros(1, 8), torch.tensor([5]), tau=0.125)
    assert uniform.proxy_log_prob.item() == pytest.approx(-math.log(8)) and uniform.log_kept_mass.item() == 0.0


def test_a_fixed_threshold_that_keeps_nothing_regularises_nothing():
    logits = torch.zeros(2, 8, requires_grad=True)
    found = token_statistics(logits, torch.tensor([0, 7]), tau=0.5)
    assert found.log_kept_mass.tolist() == [0.0, 0.0] and found.proxy_log_prob.tolist() == [-math.inf, -math.inf]
    found.log_kept_mass.sum().backward()
    assert torch.equal(logits.grad, torch.zeros(2, 8))


def test_a_tiny_dropped_mass_is_not_rounded_away():
    """d/k = 1e-9: s - k and ln(k/s) are both 0 in fp32."""
    logits = torch.tensor([[0.0, math.log(1e-9)]])
    found = token_statistics(logits, torch.tensor([0]), min_p=0.02)
    assert found.log_kept_mass.item() == pytest.approx(-1e-9, rel=1e-5)


def test_a_target_without_probability_has_log_prob_minus_infinity_and_no_nan():
    logits = torch.tensor([[0.0, 1.0, -math.inf, 7.0]]).expand(5, 4).clone().requires_grad_()
    targets = torch.tensor([2, 3, 9, -1, 0])  # a hole, padding, beyond, before, real
    found = token_statistics(logits, targets, vocab_size=3, min_p=0.1)
    assert found.log_prob[:4].tolist() == [-math.inf] * 4 == found.proxy_log_prob[:4].tolist()
    assert found.log_prob[4].item() == pytest.approx(-math.log1p(math.e))
    mask = torch.tensor([False, False, False, False, True])
    torch.where(mask, found.log_prob + found.entropy + found.log_kept_mass, 0.0).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:4].any() and not logits.grad[:, 2:].any() and logits.grad[4, :2].abs().min() > 0.01


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[3e4, -3e4, 0.0], [80.0, 80.0, -200.0]], requires_grad=True)
    found = token_statistics(logits, torch.tensor([1, 0]), temperature=0.1, min_p=0.02)
    for name in ("log_prob", "entropy", "max_log_prob", "sum_squares", "log_kept_mass"):
        assert torch.isfinite(getattr(found, name)).all(), name
    assert found.entropy.tolist() == pytest.approx([0.0, math.log(2)])
    (found.log_prob + found.entropy + found.log_kept_mass).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_gradient_of_ln_z_is_q_minus_p_detached_or_through():
    """Spec D.2: KL(q||p) = -ln Z, its gradient p - q whether the proxy q is detached or follows the policy."""
    case = make_case(5, 6, 20, 20, StatisticsOptions(min_p=0.2))
    z = case.logits.clone().requires_grad_()
    (-token_statistics(z, case.targets, **vars(case.options)).log_kept_mass.sum()).backward()
    p = torch.softmax(case.logits, 1)
    keep = p >= 0.2 * (1 - 1e-9) * p.max(1, keepdim=True).values
    q = torch.where(keep, p, 0.0) / torch.where(keep, p, 0.0).sum(1, keepdim=True)
    torch.testing.assert_close(z.grad, p - q)
    for detach in (True, False):
        free = case.logits.clone().requires_grad_()
        log_p = torch.log_softmax(free, 1)
        kept = torch.where(keep, log_p.exp(), 0.0)
        proxy = q if detach else kept / kept.sum(1, keepdim=True)
        kl = torch.where(keep, proxy * (proxy.clamp(min=1e-300).log() - log_p), 0.0).sum()
        kl.backward()
        torch.testing.assert_close(free.grad, p - q)


def test_expected_gradient_of_the_sampled_k3_is_p_minus_q():
    """Spec A.3, over every possible sample o: E_{o~p}[grad k3] = p - q, with k3's slope 1 - q(o)/p(o) in ln p(o)."""
    options = StatisticsOptions(min_p=0.2)
    logits = make_case(11, 2, 12, 12, options).logits[1].expand(12, 12).clone().requires_grad_()
    found = token_statistics(logits, torch.arange(12), **vars(options))
    gap = found.proxy_log_prob - found.log_prob.detach()
    p = found.log_prob.detach().exp()
    (p * (1 - gap.exp()) * found.log_prob).sum().backward()
    q = found.proxy_log_prob.exp()
    torch.testing.assert_close(logits.grad.sum(0), p - q)
    assert (q == 0).any() and q.sum().item() == pytest.approx(1.0)


def test_single_pass_proxy_equals_a_second_masked_pass():
    case = make_case(8, 10, 30, 30, StatisticsOptions(temperature=0.8, min_p=0.1))
    found = token_statistics(case.logits, case.targets, **vars(case.options))
    p = torch.softmax(case.logits, 1)
    masked = case.logits.masked_fill(p < 0.1 * (1 - 1e-9) * p.max(1, keepdim=True).values, -torch.inf) / 0.8
    second = torch.log_softmax(masked, 1).gather(1, case.targets[:, None])[:, 0]
    torch.testing.assert_close(found.proxy_log_prob, second)
    assert second.isinf().any() and second.isfinite().any()


def test_only_the_three_differentiable_statistics_carry_gradients():
    logits, options = torch.randn(3, 5, requires_grad=True), StatisticsOptions(min_p=0.1)
    found = token_statistics(logits, torch.arange(3), **vars(options))
    assert {name for name in FIELDS if getattr(found, name).requires_grad} == set(DIFFERENTIABLE)
    assert isinstance(found, TokenStatistics) and all(getattr(found, name).shape == (3,) for name in FIELDS)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"min_p": 0.0}, r"min_p must be in \(0, 1\]"),
        ({"tau": 1.5}, r"tau must be in \(0, 1\]"),
        ({"min_p": 0.1, "tau": 0.1}, "one threshold"),
        ({"top": -1}, "top must be at least 0"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        StatisticsOptions(**options)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"not \[2, 3, 4\] and \[2\]"):
        token_statistics(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="vocab_size=5 is more than the 4 columns"):
        token_statistics(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long), vocab_size=5)


@pytest.mark.skipif(not vocab_passes.can_fuse(), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, StatisticsOptions(tau=1e-4)),
        (torch.bfloat16, StatisticsOptions(min_p=0.02, temperature=0.7)),
    ],
)
def test_fused_passes_of_a_real_vocabulary(dtype: torch.dtype, options: StatisticsOptions):
    """From FUSE_FROM columns on: fp64's values to 2e-6, and no more of its gradient lost than the dtype must lose."""
    vocab, padded = 20_011, 20_032
    case = make_case(11, 24, vocab, padded, options)
    padding = torch.full((24, padded - vocab), 1e4, dtype=torch.float64)
    logits = torch.cat([case.logits, padding], dim=1).to(dtype).requires_grad_()
    found = token_statistics(logits, case.targets, vocab_size=vocab, **vars(options))
    weighted({name: getattr(found, name) for name in FIELDS}, case).backward()
    values, gradient = expected(case, dtype)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name).detach().double(), values[name], rtol=2e-6, atol=2e-6)
    error = (logits.grad.double() - gradient).norm() / gradient.norm()
    rounding = (gradient.to(dtype).double() - gradient).norm() / gradient.norm()
    assert error < rounding + 1e-6


@pytest.mark.skipif(not vocab_passes.can_fuse(), reason="needs a C++ compiler")
def test_what_a_gpu_fuses_gives_the_same_fused(monkeypatch: pytest.MonkeyPatch):
    """The formulas of row vectors, compiled for the CPU; in this process, for compilers and forks do not get on."""
    monkeypatch.setattr(vocab_passes, "on_triton", lambda tensor: True)
    monkeypatch.setattr(vocab_formulas, "passes_for", lambda logits: vocab_passes)
    case = make_case(7, 14, 37, 37, StatisticsOptions(min_p=0.1, temperature=0.7), holes=True, top=5)
    options = vars(case.options)
    before = token_statistics(case.old.float(), case.targets, **options | {"top": case.top})
    logits = case.logits.float().requires_grad_()
    old_top = (before.top_ids, before.top_log_probs)
    found = token_statistics(logits, case.targets, old_top=old_top, **options)
    found_values = {name: getattr(found, name) for name in case.fields}
    weighted(found_values, case).backward()
    values, gradient = expected(case, torch.float32)
    for name in case.fields:
        torch.testing.assert_close(found_values[name].detach().double(), values[name], rtol=2e-6, atol=2e-6)
    assert (logits.grad.double() - gradient).norm() < 1e-6 * (gradient.norm() + case.upstream.norm())


def test_on_a_cpu_they_stay_as_they_are_beside_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "has_triton", lambda: True)
    compiled: list[object] = []
    monkeypatch.setattr(vocab_passes, "_fused", lambda function: compiled.append(function) or function)
    logits = torch.randn(3, 5, requires_grad=True)
    token_statistics(logits, torch.arange(3), min_p=0.1).log_prob.sum().backward()
    assert compiled == []


def test_overwriting_puts_the_gradient_where_the_logits_were():
    case = make_case(12, 9, 30, 32, StatisticsOptions(min_p=0.1))
    want = expected(case, torch.float64)[1]
    leaf = torch.cat([case.logits, torch.zeros(9, 2, dtype=torch.float64)], dim=1).requires_grad_()
    logits = leaf * 1.0  # its backward does not read its result
    address = logits.data_ptr()
    found = token_statistics(logits, case.targets, vocab_size=30, **vars(case.options), overwrite=True)
    total = weighted({name: getattr(found, name) for name in DIFFERENTIABLE}, case)
    (gradient,) = torch.autograd.grad(total, logits, retain_graph=True)
    assert gradient.data_ptr() == address
    torch.testing.assert_close(gradient, want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
