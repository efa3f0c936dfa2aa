"""The policy's weights into the rollout engine, and the proof that they arrived.

After every sync each tensor is compared, value by value, with what the engine's own kernels then compute with: not with
what was sent, and cut by a slicer of our own that shares nothing with the engine's loader. Vectors and matrices of up
to 128 columns are compared whole every time; of a wider one some columns, all rows, others each time (WIDTHS), and
where the engine computes with the tensor itself, as every GPU does, a checksum of each row's bits besides: no element
is left out. Where a CPU computes with a repacked copy, a stale, swapped or wrongly cut tensor shows in nearly every
column; a lone flipped element of a wide matrix within a round of columns / width syncs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlvr import platform
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.reduce import all_max, gather_objects
from megatron_rlvr.rollout.engine import Engine

# (up to so many columns, compared per sync). Reading c of k columns back from a repacked [n, k] kernel costs n * k * c
# multiplications, so c falls; one column goes through the kernel's matrix-vector path at the speed of memory.
WIDTHS = ((128, 128), (1024, 16), (math.inf, 1))

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ALL = slice(None)


class WeightSyncError(RuntimeError):
    """The engine does not hold the policy's weights; it stays unable to generate."""


@dataclass(frozen=True)
class SyncReport:
    """SyncReport(verified=True, seconds=0.021, proof_seconds=0.004, bytes=3407872, checked=48, share=1.0)"""

    verified: bool
    seconds: float  # sync and proof
    proof_seconds: float
    bytes: int  # of the whole tensors
    checked: int  # tensors compared on this rank
    share: float  # of this rank's elements that were compared or are in a checksum

    def metrics(self) -> dict[str, float | bool]:
        names = ("verified", "seconds", "proof_seconds", "share")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, eq=False)
class Destination:
    """Where a part of a Hugging Face tensor must be in this engine rank.

    k_proj of 2 heads of 16 on rank 1 of 2, behind 2 query heads:
    Destination("model.layers.0.self_attn.qkv_proj.weight", slice(32, 48), slice(16, 32), slice(None))
    """

    parameter: str  # the engine's name
    held_rows: slice  # within the engine's tensor
    rows: slice  # of the whole tensor
    columns: slice


@dataclass(frozen=True, eq=False)
class Expected:
    """What a destination must hold: the values of some columns, and a checksum of each row's bits."""

    window: slice
    values: Tensor
    checksums: Tensor | None = None  # [rows] int64; None where the values are all, or the engine cannot be read whole


class WeightSync:
    """Pushes weights into one engine; remembers which columns the next proof looks at."""

    def __init__(self, engine: Engine, architecture: Architecture, groups: ParallelGroups) -> None:
        self.engine, self.architecture, self.groups = engine, architecture, groups
        vocab_rows = engine.held(_EMBEDDING, slice(0, 1)).shape[0]
        self.plan = destinations(architecture, engine.tp_rank, engine.tp_size, vocab_rows)
        planned = {place.parameter for places in self.plan.values() for place in places}
        if unplanned := sorted(engine.parameter_names() - planned):
            raise WeightSyncError(f"no weight of the policy fills the engine's {', '.join(unplanned)}")
        self._syncs = 0

    @torch.no_grad()
    def push(self, weights: Iterator[tuple[str, Tensor]]) -> SyncReport:
        """Every weight from ``weights`` into the engine, then the proof; all ranks together.

        Raises WeightSyncError on every rank when a tensor is missing, unknown or different on any; the engine then
        refuses to generate until a later push succeeds. What ``weights`` itself raises ends this rank alone: the others
        wait in a collective of it, and go with the run.
        """
        started = time.perf_counter()
        self.engine.ready = False
        stream = _Stream(weights, self.plan, self.engine, self.architecture.tied, self._syncs)
        self._syncs += 1
        failure, cause = "", None
        try:
            self.engine.load_weights(stream)
            compared = time.perf_counter()
            failure = stream.missing() or self._compare(stream.expected)
            stream.seconds += time.perf_counter() - compared
        except Exception as error:  # raised again below, once every rank knows
            if stream.is_waiting:
                raise
            failure, cause = f"{type(error).__name__}: {error}", error
            for _ in weights:  # its collectives need every rank to the end
                pass
        self._agree(failure, cause)
        self.engine.ready = True
        return SyncReport(
            verified=True,
            seconds=time.perf_counter() - started,
            proof_seconds=stream.seconds,
            bytes=stream.bytes,
            checked=len(stream.expected),
            share=stream.compared_elements / max(1, stream.elements),
        )

    def _compare(self, expected: dict[Destination, Expected]) -> str:
        """The first difference between what must be there and what the engine holds, or nothing."""
        read, held = "", torch.empty(0)  # stacked parts follow one another: their matrix is read once
        for source, places in self.plan.items():
            for place in places:
                wanted = expected[place]
                if read != place.parameter:
                    read, held = place.parameter, self.engine.held(place.parameter, wanted.window)
                found = held[place.held_rows]
                where = f"{source} differs in the engine's {place.parameter}"
                if not _equal(found, wanted.values):
                    return f"{where}: {_difference(found, wanted.values)}"
                if wanted.checksums is not None:
                    whole = self.engine.held(place.parameter, _ALL)[place.held_rows]
                    if wrong := int((_checksums(whole) != wanted.checksums).sum()):
                        return f"{where}: {wrong} of {len(whole)} rows have other bits"
        return ""

    def _agree(self, failure: str, cause: Exception | None) -> None:
        """Raise on every rank what failed on any."""
        failed = torch.tensor(float(bool(failure)), device=platform.device())
        if not all_max(failed, self.groups.world):
            return
        reports = enumerate(gather_objects(failure, self.groups.world))
        rank, first = next((rank, text) for rank, text in reports if text)
        raise WeightSyncError(f"weight sync failed on rank {rank}: {first}; the engine cannot generate") from cause


class _Stream:
    """Passes weights on, and keeps of each what this engine rank must hold afterwards."""

    def __init__(
        self,
        weights: Iterator[tuple[str, Tensor]],
        plan: dict[str, list[Destination]],
        engine: Engine,
        tied: bool,
        syncs: int,
    ) -> None:
        self._weights, self._plan, self._engine, self._tied, self._syncs = weights, plan, engine, tied, syncs
        self.expected: dict[Destination, Expected] = {}
        self._seen: set[str] = set()
        self.is_waiting = False  # for the next weight
        self.seconds, self.bytes, self.elements, self.compared_elements = 0.0, 0, 0, 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        while True:
            self.is_waiting = True
            name, tensor = next(self._weights, ("", None))
            self.is_waiting = False
            if tensor is None:
                return
            self._keep(name, tensor)
            yield name, tensor
            if self._tied and name == _EMBEDDING:
                # On a CPU the head multiplies with a repacked copy that is only renewed when the head itself is loaded.
                yield _HEAD, tensor

    def missing(self) -> str:
        absent = sorted(set(self._plan) - self._seen)
        return f"the policy sent no {', '.join(absent)}" if absent else ""

    def _keep(self, name: str, tensor: Tensor) -> None:
        started = time.perf_counter()
        if name not in self._plan or name in self._seen:
            raise WeightSyncError(
                f"the policy sent {name}{' twice' if name in self._seen else ', which nothing holds'}"
            )
        self._seen.add(name)
        for destination in self._plan[name]:
            part = tensor[destination.rows]
            if part.dim() == 2:
                part = part[:, destination.columns]
            self.expected[destination] = expected = self._of_part(part, destination.parameter)
            self.elements += part.numel()
            self.compared_elements += (part if expected.checksums is not None else expected.values).numel()
        self.bytes += tensor.nbytes
        self.seconds += time.perf_counter() - started

    def _of_part(self, part: Tensor, parameter: str) -> Expected:
        if part.dim() == 1:
            return Expected(_ALL, part.clone())
        window = _window(part.shape[1], self._syncs)
        # An exclusive or does not see the order of a row; the window of columns, which moves on, does.
        is_cut = window.stop - window.start < part.shape[1]
        checksums = _checksums(part) if is_cut and self._engine.is_plain(parameter) else None
        return Expected(window, _by_columns(part[:, window]), checksums)


def _checksums(matrix: Tensor) -> Tensor:
    """[n, k] -> [n]: the exclusive or of each row's bits, as whole numbers that every device can compare."""
    return torch.hash_tensor(matrix, 1).view(torch.int64)


def _by_columns(part: Tensor) -> Tensor:
    """A copy laid out column after column, as a kernel gives it back: equal strides compare four times faster."""
    return part.T.clone(memory_format=torch.contiguous_format).T


def _window(columns: int, syncs: int) -> slice:
    """The columns that sync number ``syncs`` compares; consecutive syncs walk through all of them."""
    width = min(columns, next(width for most, width in WIDTHS if columns <= most))
    start = min(syncs % -(-columns // width) * width, columns - width)
    return slice(start, start + width)


def _equal(found: Tensor, wanted: Tensor) -> bool:
    """Same shape and values; a repacked kernel has no sign of zero and, in bf16, no denormals."""
    if found.shape != wanted.shape:
        return False
    found = found.to(wanted.dtype)
    if torch.equal(found, wanted):
        return True
    tiny = torch.finfo(wanted.dtype).tiny
    return bool(((found == wanted) | ((found.abs() < tiny) & (wanted.abs() < tiny))).all())


def _difference(found: Tensor, wanted: Tensor) -> str:
    if found.shape != wanted.shape:
        return f"shape {list(found.shape)} instead of {list(wanted.shape)}"
    if not wanted.isfinite().all():
        return "the policy's own tensor holds NaN or infinity"
    gap = (found.float() - wanted.float()).abs()
    return f"{int((gap > 0).sum())} of {gap.numel()} compared values, by up to {float(gap.max()):.3g}"


def destinations(
    architecture: Architecture, tp_rank: int, tp_size: int, vocab_rows: int
) -> dict[str, list[Destination]]:
    """Hugging Face name -> where its parts must be in engine rank ``tp_rank``, of ``vocab_rows`` vocabulary rows each.

    Queries, keys and values are stacked in one matrix, gate and up in another; with more ranks than key-value heads,
    neighbouring ranks hold the same head.
    """
    kv_parts = min(tp_size, architecture.num_kv_heads)
    query = _part(architecture.query_size, tp_rank, tp_size)
    kv = _part(architecture.kv_size, tp_rank * kv_parts // tp_size, kv_parts)
    ffn = _part(architecture.ffn_size, tp_rank, tp_size)
    plan: dict[str, list[Destination]] = {}

    def stack(module: str, fused: str, leaf: str, parts: dict[str, slice]) -> None:
        start = 0
        for name, rows in parts.items():
            stop = start + rows.stop - rows.start
            plan[f"{module}.{name}.{leaf}"] = [Destination(f"{module}.{fused}.{leaf}", slice(start, stop), rows, _ALL)]
            start = stop

    def whole(name: str, columns: slice = _ALL) -> None:
        plan[name] = [Destination(name, _ALL, _ALL, columns)]

    # The engine pads the vocabulary, so that the last ranks may hold fewer rows of it, or none.
    first, last = (min(rank * vocab_rows, architecture.vocab_size) for rank in (tp_rank, tp_rank + 1))
    vocab, held = slice(first, last), slice(0, last - first)
    plan[_EMBEDDING] = [Destination(_EMBEDDING, held, vocab, _ALL)]
    plan.setdefault(_EMBEDDING if architecture.tied else _HEAD, []).append(Destination(_HEAD, held, vocab, _ALL))
    for layer in range(architecture.num_layers):
        prefix = f"model.layers.{layer}"
        for leaf in ["weight", "bias"] if architecture.qkv_bias else ["weight"]:
            stack(f"{prefix}.self_attn", "qkv_proj", leaf, {"q_proj": query, "k_proj": kv, "v_proj": kv})
        stack(f"{prefix}.mlp", "gate_up_proj", "weight", {"gate_proj": ffn, "up_proj": ffn})
        whole(f"{prefix}.self_attn.o_proj.weight", query)
        whole(f"{prefix}.mlp.down_proj.weight", ffn)
        for norm in ["input_layernorm", "post_attention_layernorm"]:
            whole(f"{prefix}.{norm}.weight")
        for norm in ["q_norm", "k_norm"] if architecture.qk_norm else []:
            whole(f"{prefix}.self_attn.{norm}.weight")
    whole("model.norm.weight")
    return plan


def _part(size: int, index: int, parts: int) -> slice:
    return slice(index * size // parts, (index + 1) * size // parts)
