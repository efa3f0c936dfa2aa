"""Whole tensors moved between ranks, byte for byte: what weight gathering and weight sync are made of."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rlvr.distributed.groups import group_size


def all_gather_flat(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """[n] of any dtype, the same n on every rank -> [size, n], row r from group rank r. One collective.

    Raises ValueError for a tensor that is not flat or not contiguous.
    """
    if tensor.dim() != 1:
        raise ValueError(f"all_gather_flat takes a [n] tensor, not {list(tensor.shape)}: flatten it first")
    _require_contiguous(tensor)
    if group is None:
        return tensor.unsqueeze(0)
    gathered = tensor.new_empty(group_size(group) * tensor.numel())
    dist.all_gather_into_tensor(_as_bytes(gathered), _as_bytes(tensor.detach()), group=group)
    return gathered.view(group_size(group), tensor.numel())


def broadcast_tensor(tensor: Tensor, source: int, group: ProcessGroup | None) -> Tensor:
    """Overwrite ``tensor`` with that of group rank ``source`` (same shape and dtype on every rank) and return it.

    Raises ValueError for a tensor that is not contiguous.
    """
    _require_contiguous(tensor)
    if group is not None:
        dist.broadcast(_as_bytes(tensor.detach().view(-1)), group_src=source, group=group)
    return tensor


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as uint8: a copy needs no arithmetic, so the backend need not know the dtype."""
    return tensor.view(torch.uint8)


def _require_contiguous(tensor: Tensor) -> None:
    """gloo reads the memory from the first element on and ignores strides, so anything else arrives silently wrong."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"a {list(tensor.shape)} tensor with strides {list(tensor.stride())} is not contiguous and cannot be sent "
            f"as it is: call .contiguous() first"
        )
