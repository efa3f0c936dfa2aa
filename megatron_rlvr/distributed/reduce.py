"""Numbers that are taken over every rank: sums, means, quantiles, and whatever the last pipeline stage has to tell."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rlvr.distributed.collect import all_gather_flat, broadcast_tensor
from megatron_rlvr.distributed.groups import ParallelGroups, group_size
from megatron_rlvr.metrics import Meter


def all_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """The elementwise sum over the group, detached; the input keeps its values. One collective."""
    return _all_reduce(tensor, dist.ReduceOp.SUM, group)


def all_max(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """The elementwise maximum over the group, detached; the input keeps its values. One collective."""
    return _all_reduce(tensor, dist.ReduceOp.MAX, group)


def _all_reduce(tensor: Tensor, operation: Any, group: ProcessGroup | None) -> Tensor:
    if group is None:
        return tensor.detach()
    # a fresh contiguous copy: gloo ignores strides, and the caller's tensor is not to change
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, operation, group=group)
    return result


def masked_mean(values: Tensor, mask: Tensor, group: ProcessGroup | None) -> Tensor:
    """Mean of ``values`` where ``mask`` (same shape, any number per rank), over every rank; scalar, 0 for no values."""
    _, mean, _ = _masked_moments(values, mask, group)
    return mean.to(values.dtype)


def masked_std(values: Tensor, mask: Tensor, group: ProcessGroup | None) -> Tensor:
    """Unbiased standard deviation of ``values`` where ``mask``, over every rank; scalar, 0 below two values."""
    count, mean, selected = _masked_moments(values, mask, group)
    squares = all_sum((selected - mean).square().sum(), group)
    return (squares / (count - 1).clamp(min=1)).sqrt().to(values.dtype)


def _masked_moments(values: Tensor, mask: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, both over every rank, this rank's selected values), in fp64: how ranks share them cannot show."""
    selected = values.detach()[mask].double()
    count, summed = all_sum(torch.stack([mask.sum().double(), selected.sum()]), group)
    return count, summed / count.clamp(min=1), selected


def lowest_quantile(values: Tensor, mask: Tensor, share: float, group: ProcessGroup | None) -> Tensor:
    """The scalar below or at which the lowest ceil(share * n) of all n masked values over every rank lie.

    Exact: a rank sends as many of its lowest values as the whole selection could need. ``values`` and ``mask`` [T] may
    differ in length between ranks. -inf when nothing is selected. Ties with the result can make ``values <= result``
    select more than the share.
    """
    n = int(all_sum(mask.sum(), group))
    # rounded first: 0.07 * 100 is 7.000000000000001, which is not the eighth value
    selected = min(n, math.ceil(round(share * n, 6)))
    if selected == 0:
        return values.new_tensor(-torch.inf)
    lowest = values.detach()[mask].sort().values[:selected]
    padding = lowest.new_full((selected - lowest.numel(),), torch.inf)
    candidates = all_gather_flat(torch.cat([lowest, padding]), group)
    return candidates.flatten().sort().values[selected - 1]


def gather_by_index(values: Tensor, index: Tensor, total: int, group: ProcessGroup | None) -> Tensor:
    """Each rank's ``values`` [S] at places ``index`` [S] int64 of the result [total]; together they cover it once.

    Raises ValueError naming the first place that no rank, or more than one, gives a value for.
    """
    scattered = values.new_zeros(2, total)
    scattered[0].index_add_(0, index, values.detach())
    scattered[1].index_add_(0, index, torch.ones_like(values))
    gathered, filled = all_sum(scattered, group)
    wrong = (filled != 1).nonzero()
    if wrong.numel():
        place = int(wrong[0])
        raise ValueError(f"place {place} of {total} is given {int(filled[place])} values by the ranks, but needs one")
    return gathered


def broadcast_from_last_stage(
    tensor: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    groups: ParallelGroups,
) -> Tensor:
    """The last pipeline stage's ``tensor`` on every stage; the other stages pass None and say what arrives.

    Raises ValueError when the last stage's tensor is not what was said.
    """
    if groups.is_last_stage:
        if tensor is None or tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            held = "None" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"the last stage has {held} to broadcast, where the others expect {list(shape)} {dtype}")
        result = tensor.detach().contiguous()
    else:
        result = torch.empty(shape, dtype=dtype, device=device)
    return broadcast_tensor(result, groups.pp_size - 1, groups.pp)


def gather_objects(obj: Any, group: ProcessGroup | None) -> list[Any]:
    """Every rank's picklable ``obj``, in group rank order, on every rank."""
    if group is None:
        return [obj]
    gathered: list[Any] = [None] * group_size(group)
    dist.all_gather_object(gathered, obj, group=group)
    return gathered


def broadcast_object(obj: Any, source: int, group: ProcessGroup | None) -> Any:
    """The picklable ``obj`` of group rank ``source`` on every rank."""
    if group is None:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, group_src=source, group=group)
    return box[0]


def reduce_meter(meter: Meter, groups: ParallelGroups) -> Meter:
    """The last stage's meters over all data-parallel ranks, on every rank; what other stages metered is left out."""
    merged = Meter()
    for sums, maxima in gather_objects((meter.sums, meter.maxima), groups.dp):
        merged.merge(_meter(sums, maxima))
    return _meter(*broadcast_object((merged.sums, merged.maxima), groups.pp_size - 1, groups.pp))


def _meter(sums: dict[str, tuple[float, float]], maxima: dict[str, float]) -> Meter:
    meter = Meter()
    for name, (total, count) in sums.items():
        meter.add(name, total, count)
    for name, value in maxima.items():
        meter.maximum(name, value)
    return meter
