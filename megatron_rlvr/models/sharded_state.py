"""A model and its optimizer as boxes of whole tensors: what a checkpoint of any layout is written from and read into.

Keys and shapes are Megatron's own: those of the model's ``sharded_state_dict``, and ``optimizer.state.exp_avg.KEY``.
A distributed optimizer holds, per data-parallel rank, a flat range of each parameter; Megatron's ways to save it either
gather everything on each rank, or fix tp and pp (optimizer/distrib_optimizer.py:1184). A flat range is a few boxes of
the whole tensor, so each rank writes and reads its own, in place, and no layout is special. Megatron's load is not used
either: it gives every parameter the same step counter, which torch's AdamW then counts up once per parameter (:821).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_rlvr import platform
from megatron_rlvr.models.trainable import Trainable

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of a flattened parameter: this rank's optimizer holds their master copy and moments."""

    optimizer: Any  # torch's, or a fused one with the same state
    main: Tensor
    start: int
    stop: int
    shared: bool  # every data-parallel rank holds the same


def model_tensors(model: Trainable) -> list[ShardedTensor]:
    """This rank's parameters, views of the live ones."""
    return [_box(leaf, leaf.data, (0,) * leaf.data.dim()) for _, leaf in _leaves(model)]


def optimizer_tensors(model: Trainable) -> list[ShardedTensor]:
    """This rank's moments, and its fp32 masters where the model is of another dtype: views of the live ones."""
    slices, found = _slices(model), []
    for parameter, leaf in _leaves(model):
        held = slices.get(parameter)
        if held is None:
            continue
        state = allocated(held)
        named = {name: state[name] for name in MOMENTS}
        if held.main.dtype != parameter.dtype:
            named["param"] = held.main
        first = leaf.data.storage_offset() - parameter.storage_offset()
        start, stop = max(held.start, first), min(held.stop, first + leaf.data.numel())
        for name, tensor in named.items():
            flat = tensor.detach().view(-1)[start - held.start : stop - held.start] if stop > start else tensor[:0]
            base = replace(leaf, key=f"optimizer.state.{name}.{leaf.key}", data=None, dtype=tensor.dtype)
            if not held.shared:
                base.replica_id = (*leaf.replica_id[:2], 0)  # no other data-parallel rank has these elements
            for offset, sizes, piece in _cut(leaf.data.shape, start - first, flat):
                found.append(_box(base, piece.view(sizes), offset))
    return found


def updates_done(model: Trainable) -> int:
    """Updates that the optimizer has counted. Raises RuntimeError where its parameters disagree."""
    counts = set()
    for held in _slices(model).values():
        state, group = held.optimizer.state.get(held.main, {}), _group_of(held)
        counts.add(int(state["step"]) if "step" in state else int(group.get("step", 0)))
    if len(counts) > 1:
        raise RuntimeError(f"the optimizer's parameters count different numbers of updates: {sorted(counts)}")
    return counts.pop() if counts else 0


def set_updates(model: Trainable, updates: int) -> None:
    """Let every parameter have counted ``updates``, each on a counter of its own."""
    for held in _slices(model).values():
        state = allocated(held)
        if "step" in state:
            state["step"] = torch.full_like(state["step"], float(updates))
        else:
            _group_of(held)["step"] = updates


def allocate(model: Trainable) -> None:
    """Make the optimizer's state now, as its first update would."""
    for held in _slices(model).values():
        allocated(held)


def allocated(held: Slice) -> dict[str, Any]:
    """The optimizer's state of one parameter, made as its first update would make it where there was none yet."""
    state = held.optimizer.state[held.main]
    if not state:
        if isinstance(held.optimizer, torch.optim.AdamW):
            state["step"] = torch.tensor(0.0)
        for name in MOMENTS:
            state[name] = torch.zeros_like(held.main, dtype=torch.float32)
    return state


def _group_of(held: Slice) -> dict[str, Any]:
    return next(group for group in held.optimizer.param_groups if any(item is held.main for item in group["params"]))


def _leaves(model: Trainable) -> Iterator[tuple[Tensor, ShardedTensor]]:
    """(parameter, part of it that lies in one piece in the whole tensor); a gated MLP's matrix is two such parts."""
    with platform.megatron_calls():
        for chunk in model.chunks:
            for item in chunk.sharded_state_dict().values():
                if isinstance(item, ShardedObject):  # extra states of Transformer Engine's fp8, which is not used
                    continue
                parts = item.build() if isinstance(item, ShardedTensorFactory) else [item]
                for part in parts:
                    yield item.data, replace(part, data=part.data.detach(), key=part.key)


def _slices(model: Trainable) -> dict[Tensor, Slice]:
    """Parameter -> the part of it that this rank's optimizer updates; without those it has no part of."""
    slices: dict[Tensor, Slice] = {}
    for wrapped in model.optimizer.chained_optimizers:
        inner = wrapped.optimizer
        if isinstance(wrapped, DistributedOptimizer):
            for parameter, (group, order) in wrapped.model_param_group_index_map.items():
                held = wrapped._get_model_param_range_map(parameter)["param"]
                main = inner.param_groups[group]["params"][order]
                slices[parameter] = Slice(inner, main, held.start, held.end, shared=False)
            continue
        owned = {id(item) for group in inner.param_groups for item in group["params"]}
        for chunk in model.chunks:
            for parameter in chunk.parameters():
                main = getattr(parameter, "main_param", parameter)
                if id(main) in owned:
                    slices[parameter] = Slice(inner, main, 0, parameter.numel(), shared=True)
    return slices


def _box(leaf: ShardedTensor, data: Tensor, offset: tuple[int, ...]) -> ShardedTensor:
    """``data``, which lies at ``offset`` in ``leaf``, as a box of the whole tensor, whose first axis are the layers."""
    stacked, inner = leaf.global_offset[: leaf.prepend_axis_num], leaf.global_offset[leaf.prepend_axis_num :]
    data = data.view((1,) * len(stacked) + tuple(data.shape))
    return replace(
        leaf,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_offset=(*stacked, *(a + b for a, b in zip(inner, offset, strict=True))),
        axis_fragmentations=None,  # the boxes form no grid
        prepend_axis_num=0,
    )


def _cut(shape: torch.Size, start: int, flat: Tensor) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
    """(offset, sizes, elements) of the boxes that ``flat``, from element ``start`` on, fills in such a tensor."""
    taken = 0
    for offset, sizes in boxes(tuple(shape), start, start + flat.numel()):
        count = math.prod(sizes)
        yield offset, sizes, flat[taken : taken + count]
        taken += count


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Flat range [start, stop) of a row-major tensor -> (offset, sizes) of the boxes it consists of, in order.

    boxes((3, 4), 2, 9) gives ((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1)): the end of row 0, row 1, and one
    element of row 2
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # rows that are whole
    if start % row or first > last:
        end = min(stop, (start // row + 1) * row)
        yield from _in_row(shape, start // row, start, end)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if stop % row and first <= last:
        yield from _in_row(shape, last, last * row, stop)


def _in_row(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes of a range that stays within one row."""
    before = row * math.prod(shape[1:])
    for offset, sizes in boxes(shape[1:], start - before, stop - before):
        yield (row, *offset), (1, *sizes)
