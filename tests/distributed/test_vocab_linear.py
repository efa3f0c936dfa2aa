"""The statistics without logits are those of the logits: values, and gradients of hidden states and weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rlvr import platform
from megatron_rlvr.distributed import vocab_linear, vocab_passes
from megatron_rlvr.distributed.vocab_formulas import StatisticsOptions
from megatron_rlvr.distributed.vocab_linear import linear_token_statistics
from tests.distributed.test_vocab import OPTIONS, TOP_FIELDS, Case, old_reference, reference, weighted
from tests.ranks import run_ranks

WIDTH = 12


class Layer(NamedTuple):
    """An output layer and what goes into it, whole; ``case`` has the rest. Old logits come from old hidden states."""

    hidden: Tensor  # [T, WIDTH] fp64
    old_hidden: Tensor
    weight: Tensor  # [vocab_size, WIDTH]
    case: Case
    block: int  # rows of a block of logits


def make_layer(seed: int, tokens: int, vocab: int, padded: int, options: StatisticsOptions, top: int, block: int):
    generator = torch.Generator().manual_seed(seed)
    hidden, old_hidden, weight = (
        torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) for rows in (tokens, tokens, vocab)
    )
    targets = torch.randint(vocab, (tokens,), generator=generator)
    upstream = torch.randn(4, tokens, generator=generator, dtype=torch.float64)
    case = Case(hidden @ weight.t(), targets, upstream, padded, options, old_hidden @ weight.t(), top)
    return Layer(hidden, old_hidden, weight, case, block)


def on_this_rank(
    layer: Layer, dtype: torch.dtype, sequence_parallel: bool, logits_dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Values and gradients; the padding of the vocabulary would win every maximum, that of the tokens is NaN."""
    size, rank = dist.get_world_size(), dist.get_rank()
    case, rows = layer.case, layer.case.padded // size
    padding = torch.full((case.padded - len(layer.weight), WIDTH), 1e4, dtype=torch.float64)
    weight = torch.cat([layer.weight, padding])[rank * rows :][:rows].to(dtype).clone().requires_grad_()
    shared = {
        "group": dist.group.WORLD if size > 1 else None,
        "vocab_size": len(layer.weight),
        "sequence_parallel": sequence_parallel,
        "logits_dtype": logits_dtype,
        **vars(case.options),
    }

    def held(whole: Tensor) -> Tensor:
        if not sequence_parallel:
            return whole.to(dtype).clone()
        filler = torch.full((-len(whole) % size, WIDTH), torch.nan, dtype=torch.float64)
        return torch.cat([whole, filler]).to(dtype).chunk(size)[rank].clone() if len(whole) else whole.to(dtype)

    tops, old_top = {}, None
    if case.top:
        old = linear_token_statistics(held(layer.old_hidden), weight, case.targets, **shared | {"top": case.top})
        tops, old_top = {name: getattr(old, name) for name in TOP_FIELDS}, (old.top_ids, old.top_log_probs)
    hidden = held(layer.hidden).requires_grad_()
    found = linear_token_statistics(hidden, weight, case.targets, old_top=old_top, **shared)
    values = {name: getattr(found, name) for name in case.fields}
    weighted(values, case).backward()
    values = {name: value.detach() for name, value in (values | tops).items()}
    return {"values": values, "hidden": hidden.grad, "weight": weight.grad}


def expected(layer: Layer) -> dict[str, Any]:
    hidden, weight = layer.hidden.clone().requires_grad_(), layer.weight.clone().requires_grad_()
    case = layer.case
    values = reference(hidden @ weight.t(), case.targets, case.options)
    if case.top:
        values |= old_reference(case.old, hidden @ weight.t(), case.targets, case.options, case.top)
    gradients = torch.autograd.grad(weighted(values, case), (hidden, weight))
    padding = weight.new_zeros(case.padded - len(weight), WIDTH)
    return {"values": values, "hidden": gradients[0], "weight": torch.cat([gradients[1], padding])}


def check(layers: list[Layer], dtype: torch.dtype, world_size: int, sequence_parallel: bool, close: float) -> None:
    def work():
        results = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vocab_linear, "LEAST_ROWS", 1)
            for layer in layers:
                columns = layer.case.padded // dist.get_world_size()
                patch.setattr(platform, "logits_block_elements", lambda n=layer.block * columns: n)
                results.append(on_this_rank(layer, dtype, sequence_parallel))
        return results

    ranks = run_ranks(world_size, work, timeout=120)
    for place, layer in enumerate(layers):
        wanted, found = expected(layer), [rank[place] for rank in ranks]
        for each in found:
            for name, value in each["values"].items():
                torch.testing.assert_close(value.double(), wanted["values"][name].double(), rtol=close, atol=close)
        whole = torch.cat([each["weight"] for each in found])
        torch.testing.assert_close(whole.double(), wanted["weight"], rtol=close, atol=close)
        if sequence_parallel:
            parts = [torch.cat([each["hidden"] for each in found])]
            assert not parts[0][len(layer.hidden) :].any()  # the rows that fill up get no gradient
        else:
            parts = [each["hidden"] for each in found]
        for part in parts:
            torch.testing.assert_close(part[: len(layer.hidden)].double(), wanted["hidden"], rtol=close, atol=close)


drawn = st.tuples(
    *(st.integers(0, 2**16), st.integers(0, 9), st.integers(1, 40), st.integers(0, 9)),
    *(st.sampled_from(OPTIONS), st.integers(0, 9), st.integers(1, 4)),
)


@pytest.mark.parametrize(
    ("world_size", "sequence_parallel"), [(1, False), (2, False), (4, False), (2, True), (4, True)]
)
def test_any_shape(world_size: int, sequence_parallel: bool) -> None:
    layers: list[Layer] = []

    @settings(max_examples=30, deadline=None, database=None, derandomize=True)
    @given(drawn)
    def draw(shape: tuple) -> None:
        seed, tokens, vocab, extra, options, top, block = shape
        padded = -(-(vocab + extra) // world_size) * world_size
        layers.append(make_layer(seed, tokens, vocab, padded, options, top, block))

    draw()
    assert any(len(layer.hidden) > 2 * layer.block for layer in layers)  # several blocks
    check(layers, torch.float64, world_size, sequence_parallel, 1e-9)


def test_fp32() -> None:
    check([make_layer(3, 20, 37, 40, StatisticsOptions(min_p=0.1), 5, 6)], torch.float32, 2, True, 2e-5)


@pytest.mark.parametrize(("world_size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_float32_logits_of_a_bf16_layer(world_size: int, sequence_parallel: bool, monkeypatch) -> None:
    """Statistics as exact as in fp32, of what bf16 can hold; bf16 logits near 25 lose five digits more."""
    monkeypatch.setattr(vocab_linear, "PRODUCT_ROWS", 7)  # several pieces of the widened weight
    layer = make_layer(9, 20, 37, 40, StatisticsOptions(min_p=0.1), 5, 6)
    rounded = {"hidden": (4 * layer.hidden).bfloat16().double(), "old_hidden": layer.old_hidden.bfloat16().double()}
    weight = (2 * layer.weight).bfloat16().double()
    case = layer.case._replace(logits=rounded["hidden"] @ weight.t(), old=rounded["old_hidden"] @ weight.t())
    layer = layer._replace(**rounded, weight=weight, case=case)
    assert case.logits.amax() > 20
    wanted = expected(layer)

    def work():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vocab_linear, "LEAST_ROWS", 1)
            patch.setattr(platform, "logits_block_elements", lambda: 6 * 40 // dist.get_world_size())
            return [on_this_rank(layer, torch.bfloat16, sequence_parallel, wide) for wide in (torch.float32, None)]

    ranks = run_ranks(world_size, work, timeout=120)
    exact = wanted["values"]["log_prob"]
    for wide, narrow in ranks:
        for name, value in wide["values"].items():
            torch.testing.assert_close(value.double(), wanted["values"][name].double(), rtol=2e-5, atol=2e-5)
        least, most = (float((each["values"]["log_prob"] - exact).abs().max()) for each in (wide, narrow))
        assert most > 1000 * least, (least, most)
    whole = torch.cat([wide["weight"] for wide, _ in ranks]).double()
    assert (whole - wanted["weight"]).norm() < 1e-2 * wanted["weight"].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_is_summed_in_fp32_where_megatron_keeps_it(dtype: torch.dtype) -> None:
    """On top of what is there, while ``grad`` stays empty; bf16 products are rounded once per block, not the sum."""
    layer = make_layer(5, 24, 30, 30, StatisticsOptions(min_p=0.1), 0, 8)
    weight, hidden = layer.weight.to(dtype).requires_grad_(), layer.hidden.to(dtype)
    weight.main_grad = torch.full_like(weight, 1000.0, dtype=torch.float32)
    found = linear_token_statistics(hidden, weight, layer.case.targets, min_p=0.1)
    weighted({name: getattr(found, name) for name in layer.case.fields}, layer.case).backward()
    assert weight.grad is None
    exact = expected(layer._replace(hidden=hidden.double(), weight=weight.detach().double()))["weight"]
    error = ((weight.main_grad - 1000.0).double() - exact).norm() / exact.norm()
    assert error < (5e-5 if dtype == torch.float32 else 1e-2)  # at 1000 fp32 has steps of 6e-5, bf16 would have 4


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest storage that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, Tensor):
                self.bytes = max(self.bytes, item.untyped_storage().nbytes())
        return result


def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is larger than a block of logits or ten numbers per token; all logits would take 32 blocks."""
    block = 1 << 15
    monkeypatch.setattr(platform, "logits_block_elements", lambda: block)
    monkeypatch.setattr(vocab_linear, "LEAST_ROWS", 1)
    for tokens, vocab in ((1024, 1024), (2048, 512)):
        hidden, weight = torch.randn(tokens, 2, requires_grad=True), torch.randn(vocab, 2, requires_grad=True)
        weight.main_grad = torch.zeros(vocab, 2)
        with LargestTensor() as largest:
            found = linear_token_statistics(hidden, weight, torch.zeros(tokens, dtype=torch.long), min_p=0.1, top=4)
            (found.log_prob + found.entropy + found.log_kept_mass).sum().backward()
        assert 4 * block <= largest.bytes <= 4 * max(block, 10 * tokens), largest.bytes


@pytest.mark.parametrize("columns", [1, 320, 18_992, 75_968, 151_936, 197_632])
@pytest.mark.parametrize("tokens", [1, 1000, 4096, 40_000])
def test_tiles_are_within_a_block_and_wide_enough_to_be_fused(tokens: int, columns: int) -> None:
    height, width = vocab_linear.tile(tokens, columns)
    assert height * width <= platform.logits_block_elements()
    parts = list(vocab_linear.even_parts(columns, width))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])] and parts[-1].stop == columns
    widths = [part.stop - part.start for part in parts]
    assert width >= max(widths) and min(widths) >= min(columns, vocab_passes.FUSE_FROM)
    assert not any(width % vocab_linear.ALIGNED for width in widths[:-1])  # the last one ends where the padding does


def test_one_reduction_of_the_hidden_gradient() -> None:
    """Forward a MAX per block and one SUM; backward one SUM, or under sequence parallelism gather and scatter."""

    def work():
        names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vocab_linear, "LEAST_ROWS", 1)
            patch.setattr(platform, "logits_block_elements", lambda: 4 * 8)  # four rows of eight columns
            calls: list[str] = []
            for name in names:
                original = getattr(dist, name)
                patch.setattr(dist, name, lambda *a, f=original, n=name, **k: (calls.append(n), f(*a, **k))[1])
            counts = []
            for parallel in (False, True):
                hidden = torch.randn(6 if parallel else 12, WIDTH, requires_grad=True)
                weight, targets = torch.randn(8, WIDTH, requires_grad=True), torch.arange(12)
                calls.clear()
                found = linear_token_statistics(
                    hidden, weight, targets, group=dist.group.WORLD, sequence_parallel=parallel, min_p=0.1
                )
                forward = calls.copy()
                found.log_prob.sum().backward()
                counts.append((forward, calls[len(forward) :]))
        return counts

    for replicated, parallel in run_ranks(2, work):
        assert replicated == (["all_reduce"] * 4, ["all_reduce"])
        gather = ["all_gather_into_tensor"]
        assert parallel == (gather + ["all_reduce"] * 4, [*gather, "reduce_scatter_tensor"])


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not \[2, 3\], \[4, 5\] and \[2\]"):
        linear_token_statistics(torch.zeros(2, 3), torch.zeros(4, 5), torch.zeros(2, dtype=torch.long))
