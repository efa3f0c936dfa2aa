"""Numbers that are taken over every rank: sums, means, quantiles, and whatever the last pipeline stage has to tell."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rlvr import platform
from megatron_rlvr.distributed.collect import broadcast_tensor
from megatron_rlvr.distributed.groups import ParallelGroups, group_size
from megatron_rlvr.metrics import Meter

WHITEN_EPS = 1e-8  # variance; rounding must not be blown up where all values are the same


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


def sum_scatter(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """[size * n, ...] on every rank -> [n, ...]: this rank's rows of the sum over the group, detached. One collective.

    Raises ValueError where the rows do not divide by the ranks.
    """
    if group is None:
        return tensor.detach()
    rows, size = len(tensor), group_size(group)
    if rows % size:
        raise ValueError(f"{rows} rows cannot be dealt out to {size} ranks")
    result = tensor.new_empty(rows // size, *tensor.shape[1:])
    dist.reduce_scatter_tensor(result, tensor.detach().contiguous(), group=group)
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


def whiten(values: Tensor, mask: Tensor, group: ProcessGroup | None) -> Tensor:
    """``values`` with mean 0 and (unbiased) variance 1 where ``mask``, over every rank; 0 elsewhere."""
    mean, std = masked_mean(values, mask, group), masked_std(values, mask, group)
    return torch.where(mask, (values - mean) / (std.square() + WHITEN_EPS).sqrt(), 0.0)


def _masked_moments(values: Tensor, mask: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, both over every rank, this rank's selected values), in fp64: how ranks share them cannot show."""
    selected = values.detach()[mask].double()
    count, summed = all_sum(torch.stack([mask.sum().double(), selected.sum()]), group)
    return count, summed / count.clamp(min=1), selected


def centred_products(a: Tensor, b: Tensor, mask: Tensor, group: ProcessGroup | None) -> Tensor:
    """(a - mean a) (b - mean b), all [T], means over the masked values of every rank: a token's part of a covariance.

    0 outside the mask. One collective; in fp64 inside, so that how ranks share the tokens cannot show.
    """
    dtype = a.dtype
    a, b = (torch.where(mask, values.detach().double(), 0.0) for values in (a, b))
    count, *sums = all_sum(torch.stack([values.double().sum() for values in (mask, a, b)]), group)
    mean_a, mean_b = (total / count.clamp(min=1) for total in sums)
    return torch.where(mask, (a - mean_a) * (b - mean_b), 0.0).to(dtype)


def kth_smallest(values: Tensor, mask: Tensor, k: int, group: ProcessGroup | None) -> Tensor:
    """The k-th smallest, counted from 1, of the masked values over every rank, a scalar; -inf where k is 0.

    ``values`` and ``mask`` [T] may differ in length between ranks, ``k`` may not, and is at most the number of values
    (inf above it). Exact, and ``values <= result`` selects the same tokens however ranks share them; ties with the
    result can make them more than k.

    Radix selection: each round counts the next 16 bits of those values that agree with the result so far, so two
    collectives (four for fp64) of 65,536 counts do, however many values there are and however large k is.
    """
    if k == 0:
        return values.new_tensor(-torch.inf)
    keys, result = _ordered_bits(values.detach()[mask]), 0
    bits = 8 * values.element_size()
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        digits = (keys >> shift) & (2**_DIGIT - 1)
        counts = all_sum(torch.bincount(digits, minlength=2**_DIGIT), group)
        at_or_below = counts.cumsum(0)
        if int(at_or_below[-1]) < k:
            return values.new_tensor(torch.inf)
        digit = int(torch.searchsorted(at_or_below, k))
        k -= int(at_or_below[digit] - counts[digit])
        keys, result = keys[digits == digit], result << _DIGIT | digit
    return _from_ordered_bits(result, values)


def kth_largest(values: Tensor, mask: Tensor, k: int, group: ProcessGroup | None) -> Tensor:
    """The k-th largest of the masked values over every rank, inf where k is 0: kth_smallest from the other end."""
    return -kth_smallest(-values, mask, k, group)


_DIGIT = 16  # bits that a round of the radix selection settles
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _ordered_bits(values: Tensor) -> Tensor:
    """Floats -> int64 whose digits, from the highest, order like the floats do."""
    bits = values.contiguous().view(_INTEGERS[values.dtype])
    lowest = torch.iinfo(bits.dtype).min
    # A negative float's magnitude grows downwards: flip those bits, then the sign, which set means smaller.
    return torch.where(bits < 0, ~bits, bits ^ lowest).long()


def _from_ordered_bits(key: int, like: Tensor) -> Tensor:
    """The float of that key, a scalar of ``like``'s dtype and device."""
    width = 8 * like.element_size()
    sign, every = 1 << (width - 1), (1 << width) - 1
    raw = key ^ (sign if key & sign else every)
    signed = raw - every - 1 if raw & sign else raw
    return torch.tensor(signed, dtype=_INTEGERS[like.dtype], device=like.device).view(like.dtype)


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
    tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, groups: ParallelGroups
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
        result = torch.empty(shape, dtype=dtype, device=platform.device())
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
