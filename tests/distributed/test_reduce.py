"""Reductions over ranks equal the same number taken in one process over all values."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.metrics import Meter
from tests.ranks import run_ranks

WORLD = 3


def values_of(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Per rank a different number of values, rounded so that many tie, some of them masked out and poisoned."""
    generator = torch.Generator().manual_seed(seed)
    values, masks = [], []
    for rank in range(WORLD):
        size = [40, 0, 171][rank] if seed % 2 else 60 + 7 * rank
        mine = (torch.randn(size, generator=generator) * 4).round(decimals=1)
        mask = torch.rand(size, generator=generator) < [0.8, 0.5, 0.0][rank - seed % 3]
        mine[~mask] = [math.nan, -math.inf, 1e30][seed % 3]
        values.append(mine)
        masks.append(mask)
    return values, masks


def test_a_sum_is_dealt_out_by_rows():
    def work():
        rank = dist.get_rank()
        tensor = torch.arange(12.0).view(6, 2).t().contiguous().t() * (rank + 1)  # columns first in memory
        with pytest.raises(ValueError, match="5 rows cannot be dealt out to 3 ranks"):
            reduce.sum_scatter(tensor[:5], dist.group.WORLD)
        return reduce.sum_scatter(tensor, dist.group.WORLD)

    parts = run_ranks(WORLD, work)
    assert torch.cat(parts).equal(6 * torch.arange(12.0).view(6, 2)) and parts[0].shape == (2, 2)
    assert reduce.sum_scatter(torch.ones(5, 2), None).equal(torch.ones(5, 2))


def places(total: int) -> list[int]:
    """Which of the smallest values to ask for: the ends, the middle, and one more than there are."""
    return [0, 1, 2, total // 2, total - 1, total, total + 1]


@pytest.mark.parametrize("world", [1, 2, WORLD, 4])
def test_means_deviations_and_selections_are_those_of_all_values_together(world):
    seeds = range(6)

    def work():
        found = []
        group = dist.group.WORLD if world > 1 else None
        for seed in seeds:
            all_values, all_masks = values_of(seed)
            mine = slice(dist.get_rank(), None, world) if world > 1 else slice(None)
            values, mask = (torch.cat([torch.empty(0), *part[mine]]) for part in (all_values, all_masks))
            mask = mask.bool()
            selected = []
            for dtype in (torch.float32, torch.float64):
                for k in places(sum(int(mask.sum()) for mask in all_masks)):
                    selected += [f(values.to(dtype), mask, k, group).item() for f in (smallest, largest)]
            mean, std = (f(values, mask, group).item() for f in (reduce.masked_mean, reduce.masked_std))
            products = reduce.centred_products(values, values.square() + 1, mask, group)
            found.append((selected, mean, std, products[mask].sum(), products[~mask].abs().sum()))
        return found

    smallest, largest = reduce.kth_smallest, reduce.kth_largest
    ranks = run_ranks(world, work) if world > 1 else [work()]
    for seed in seeds:
        values, masks = values_of(seed)
        ordered = torch.cat([value[mask] for value, mask in zip(values, masks, strict=True)]).sort().values
        total = ordered.numel()
        ends = [-math.inf, *ordered.tolist(), math.inf]
        expected = [value for k in places(total) for value in (ends[k], ends[total + 1 - k])]
        for selected, mean, std, _, outside in (found[seed] for found in ranks):
            assert selected == expected * 2
            assert mean == pytest.approx(ordered.double().mean().item(), rel=1e-6)
            assert std == pytest.approx(ordered.double().std().item(), rel=1e-6)
            assert outside == 0
        covariance = sum(float(found[seed][3]) for found in ranks) / (total - 1)
        assert covariance == pytest.approx(torch.stack([ordered, ordered.square()]).double().cov()[0, 1].item(), 1e-5)


def test_selection_orders_every_kind_of_float():
    values = torch.tensor([3.0, -math.inf, 1e-40, -0.0, 0.0, -1e-40, -3.4e38, 7.0, 7.0, -7.0, 3.4e38, math.inf])
    everything = torch.ones_like(values, dtype=torch.bool)
    for dtype in (torch.float32, torch.float64):
        ordered = values.to(dtype).sort().values.tolist()
        found = [reduce.kth_smallest(values.to(dtype), everything, k, None).item() for k in range(1, 13)]
        assert found == ordered
    assert int((values <= reduce.kth_smallest(values, everything, 9, None)).sum()) == 10  # the tie comes along
    assert reduce.kth_smallest(values[::2], everything[::2], 1, None) == values[6]  # strided


def test_nothing_masked_in():
    def work():
        none = torch.zeros(4, dtype=torch.bool)
        values, group = torch.full((4,), math.nan), dist.group.WORLD
        one = torch.arange(4) == (1 if dist.get_rank() == 1 else 9)
        return (
            reduce.masked_mean(values, none, group).item(),
            reduce.masked_std(values, none, group).item(),
            reduce.kth_smallest(values, none, 0, group).item(),
            reduce.centred_products(values, values, none, group).abs().sum().item(),
            reduce.masked_mean(torch.arange(4.0), one, group).item(),
            reduce.masked_std(torch.arange(4.0), one, group).item(),
        )

    assert run_ranks(2, work) == [(0.0, 0.0, -math.inf, 0.0, 1.0, 0.0)] * 2


def test_sums_maxima_and_scattered_values():
    def work():
        rank, group = dist.get_rank(), dist.group.WORLD
        strided = (torch.arange(12.0) * (rank + 1)).view(3, 4).T
        strided = strided.contiguous() if rank == 1 else strided  # gloo by itself would add by place in memory
        kept = strided.clone()
        total, most = reduce.all_sum(strided, group), reduce.all_max(-strided, group)
        assert torch.equal(strided, kept)
        index = torch.arange(rank, 7, WORLD)
        return total, most, reduce.gather_by_index(index * 1.5, index, 7, group)

    base = torch.arange(12.0).view(3, 4).T
    for total, most, gathered in run_ranks(WORLD, work):
        assert torch.equal(total, base * 6) and torch.equal(most, -base)
        assert torch.equal(gathered, torch.arange(7) * 1.5)


def test_places_that_are_missing_or_given_twice_are_named():
    with pytest.raises(ValueError, match="place 1 of 3 is given 0 values"):
        reduce.gather_by_index(torch.ones(2), torch.tensor([0, 2]), 3, None)

    def work():
        with pytest.raises(ValueError, match="place 0 of 2 is given 2 values"):
            reduce.gather_by_index(torch.ones(1), torch.tensor([0]), 2, dist.group.WORLD)

    run_ranks(2, work)


def test_alone_every_reduction_is_the_value_itself():
    values = torch.tensor([1.0, 3.0])
    assert torch.equal(reduce.all_sum(values, None), values) and torch.equal(reduce.all_max(values, None), values)
    assert reduce.gather_objects("x", None) == ["x"] and reduce.broadcast_object("x", 0, None) == "x"
    single = ParallelGroups.single()
    assert torch.equal(reduce.broadcast_from_last_stage(values, (2,), values.dtype, single), values)


def test_parts_of_a_covariance_that_are_equal_tie() -> None:
    """Two tokens' always are, each half the differences multiplied; computed in fp32 they mostly come out apart."""
    pairs = torch.randn(100, 2, 2, generator=torch.Generator().manual_seed(0))
    for a, b in pairs:
        first, second = reduce.centred_products(a, b, torch.ones(2, dtype=torch.bool), None)
        assert first == second == pytest.approx(float((a[0] - a[1]) * (b[0] - b[1])) / 4, rel=1e-5)


def test_the_last_stage_speaks_to_all():
    def work():
        groups = ParallelGroups.from_grid(pp=2, dp=2)
        tensor = torch.full((3, 2), float(groups.rank)).T if groups.is_last_stage else None
        received = reduce.broadcast_from_last_stage(tensor, (2, 3), torch.float32, groups)
        meter = Meter()
        meter.add("loss", groups.rank + 1.0, 2 + groups.dp_rank)
        meter.maximum("ratio", torch.tensor(float(groups.rank)))
        if groups.rank == 3:
            meter.add("only/here", 5.0)
        merged = reduce.reduce_meter(meter, groups)
        ranks = reduce.gather_objects({"rank": groups.rank}, groups.world)
        objects = ranks, reduce.broadcast_object(groups.rank, 1, groups.pp)
        return received, merged.sums, merged.maxima, merged.means(), objects

    for rank, (received, sums, maxima, means, objects) in enumerate(run_ranks(4, work)):
        source = rank % 2 + 2  # ranks 2 and 3 are the last stage of replicas 0 and 1
        assert torch.equal(received, torch.full((2, 3), float(source)))
        assert sums == {"loss": (7.0, 5.0), "only/here": (5.0, 1.0)} and maxima == {"ratio": 3.0}
        assert means == {"loss": 1.4, "only/here": 5.0, "ratio": 3.0}
        assert objects == ([{"rank": other} for other in range(4)], source)


def test_a_last_stage_with_something_else_says_so():
    with pytest.raises(ValueError, match=r"has \[3\] torch.float32 to broadcast, where the others expect \[2\]"):
        reduce.broadcast_from_last_stage(torch.zeros(3), (2,), torch.float32, ParallelGroups.single())
    with pytest.raises(ValueError, match="has None"):
        reduce.broadcast_from_last_stage(None, (2,), torch.float32, ParallelGroups.single())


def test_whitening_leaves_equal_values_at_zero_and_does_not_read_the_rest():
    values = torch.tensor([0.1, math.nan, 0.1, 0.1, math.inf])
    mask = torch.tensor([True, False, True, True, False])
    assert reduce.whiten(values, mask, None).abs().max() < 1e-3
    values[0] = 0.4
    assert torch.allclose(reduce.whiten(values, mask, None), torch.tensor([2.0, 0.0, -1.0, -1.0, 0.0]) / 3**0.5)
