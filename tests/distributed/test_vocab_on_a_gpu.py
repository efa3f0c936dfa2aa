"""On a GPU: both forms of the token statistics, compiled, beside the same in fp64 on the CPU, which test_vocab.py and
test_vocab_linear.py prove."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rlvr import platform
from megatron_rlvr.distributed import vocab_passes
from megatron_rlvr.distributed.vocab import DETACHED, TokenStatistics, token_statistics
from megatron_rlvr.distributed.vocab_linear import linear_token_statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

OPTIONS: dict[str, dict[str, Any]] = {
    "min_p": {"min_p": 0.02},
    "tau": {"tau": 1e-3, "temperature": 0.7, "threshold_temperature": 1.3},
    "none": {"temperature": 1.5},
    "old_kl": {"min_p": 0.05, "top": 4},
}
SHAPES = [(300, 19_008), (5, 4097), (40, 3)]  # rows that start at a multiple of 16 bytes, others, and a few columns
VALUE = 2e-6  # times 1 + |value|
GRADIENT = {torch.float32: 1e-6, torch.bfloat16: 2e-3}  # of the tensor's norm
HIDDEN = 64


@pytest.fixture(autouse=True)
def nothing_is_compiled_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab_passes, "FUSE_FROM", 10**6)


def total(found: TokenStatistics, of: dict[str, Any]) -> Tensor:
    """Something of each field that has a gradient, with a weight of its own for each token."""
    weights = torch.linspace(-1, 1, len(found.log_prob), dtype=torch.float64, device=found.log_prob.device)
    parts = found.log_prob + 0.3 * found.entropy
    parts = parts + (0.2 * found.log_kept_mass if "min_p" in of or "tau" in of else 0)
    if found.old_kl is not None:
        parts = parts + 0.1 * found.old_kl
    return (weights * parts).sum()


def compare(found: TokenStatistics, exact: TokenStatistics, tokens: int) -> None:
    """Each field, save for tokens of which another one lies within rounding of the threshold."""
    same = (found.log_kept_mass.cpu().double() - exact.log_kept_mass).abs() < 1e-4
    assert int(same.sum()) >= tokens - 1
    for name, values in vars(found).items():
        if values is None or name == "top_ids":  # equal logits may come in another order
            continue
        wanted, values = getattr(exact, name), values.cpu().double()
        values, wanted = values[same], wanted[same].double()
        assert values.isinf().equal(wanted.isinf()), name
        gap = ((values - wanted).abs() / (1 + wanted.abs()))[~wanted.isinf()]
        assert not len(gap) or float(gap.max()) < VALUE, f"{name}: {float(gap.max()):.1e}"
        assert values.requires_grad is False or name not in DETACHED


def old_top(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Another policy's three most probable tokens."""
    log_probs, ids = logits.roll(1, 0).log_softmax(1).topk(min(3, logits.shape[1]))
    return ids, log_probs


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_on_a_gpu(dtype: torch.dtype, name: str) -> None:
    for rows, columns in SHAPES:
        generator = torch.Generator().manual_seed(rows)
        source = (4 * torch.randn(rows, columns, generator=generator)).to(dtype)
        source[torch.rand(source.shape, generator=generator) < 0.05] = -torch.inf
        source[:, 0] = 1.0
        targets = torch.randint(columns, (rows,), generator=generator)
        shared = OPTIONS[name] | ({"vocab_size": columns - 1} if columns > 3 else {})
        shared["top"] = min(shared.get("top", 0), columns - 1)
        kept = old_top(source.double()[:, : columns - 1]) if name == "old_kl" else None
        results = []
        for place, form in (("cpu", torch.float64), ("cuda", dtype)):
            leaf = source.to(place, form).requires_grad_()
            old = kept and (kept[0].to(place), kept[1].to(place, torch.promote_types(form, torch.float32)))
            found = token_statistics(leaf.view_as(leaf), targets.to(place), old_top=old, overwrite=False, **shared)
            results.append((found, torch.autograd.grad(total(found, OPTIONS[name]), leaf)[0]))
        (exact, wanted), (found, gradient) = results
        compare(found, exact, rows)
        assert gradient.dtype == dtype
        gap = float((gradient.cpu().double() - wanted).norm() / wanted.norm().clamp(min=1e-30))
        assert gap < GRADIENT[dtype], f"{rows} x {columns}: {gap:.1e}"


@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_on_a_gpu(
    dtype: torch.dtype, logits_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several blocks of rows, and tiles of both; the weight's gradient is added to what its buffer holds."""
    monkeypatch.setattr(platform, "logits_block_elements", lambda: 100 * 1500)
    rows, columns = 300, 4099
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    weight = (3 * HIDDEN**-0.5 * torch.randn(columns, HIDDEN, generator=generator)).to(dtype)
    targets = torch.randint(columns, (rows,), generator=generator)
    results = []
    for place, form in (("cpu", torch.float64), ("cuda", dtype)):
        leaf, matrix = hidden.to(place, form).requires_grad_(), weight.to(place, form).requires_grad_()
        matrix.main_grad = torch.ones_like(matrix, dtype=torch.promote_types(form, torch.float32))
        logits = logits_dtype if place == "cuda" else None
        shared = {"min_p": 0.02, "top": 3, "vocab_size": columns - 9}
        found = linear_token_statistics(leaf, matrix, targets.to(place), logits_dtype=logits, **shared)
        (gradient,) = torch.autograd.grad(total(found, {"min_p": 0.02}), leaf)
        results.append((found, gradient, matrix.main_grad - 1))
    (exact, *wanted), (found, *gradients) = results
    if dtype == torch.float32 or logits_dtype:  # what bf16 logits are rounded to, fp64 ones are not
        compare(found, exact, rows)
    for gradient, right in zip(gradients, wanted, strict=True):
        gap = float((gradient.cpu().double() - right).norm() / right.norm())
        assert gap < {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype], f"{gap:.1e}"
