"""Attention over packed responses, and the norm that goes with it: a layer spec without Transformer Engine.

megatron-core's own core attention refuses packed sequences (transformer/dot_product_attention.py:153), and its torch
norm refuses sequence parallelism (transformer/torch_norm.py:32). Both classes run on a CPU and on a GPU alike. The
rotation of queries and keys is done here too: laid out one response a row, all rows share one table, where megatron's
own (rope_utils.py:178) cuts and joins a piece per response, in every layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_rlvr.architecture import RopeScaling
from megatron_rlvr.distributed import context


@dataclass(frozen=True)
class PaddedView:
    """Neighbouring responses laid out one a row; indices count from the first one's first token.

    Responses of 3 and 2 tokens: tokens = [[0, 1, 2], [3, 4, 4]] (the pad repeats a token whose output nobody reads),
    places = [0, 1, 2, 3, 4].
    """

    tokens: Tensor  # [s, L] int64, token index per place
    places: Tensor  # [t] int64, place of each token in the flattened [s * L]

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> PaddedView:
        counts, offsets = torch.tensor(lengths), torch.arange(max(lengths))
        tokens = (counts.cumsum(0) - counts)[:, None] + offsets
        places = (offsets < counts[:, None]).flatten().nonzero().flatten()
        return cls(tokens.clamp(max=len(places) - 1).to(device), places.to(device))


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed microbatch, and padded views of it."""

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> PackedSequences:
        """cu_seqlens [s + 1] int32 -> the packed description of t = cu_seqlens[-1] tokens."""
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    @functools.cached_property
    def views(self) -> list[PaddedView]:
        """The responses in order. All views together have at most sqrt(2) places per token."""
        lengths = [high - low for low, high in pairwise(self.cu_seqlens_q.tolist())]
        return [PaddedView.of(lengths[run], self.cu_seqlens_q.device) for run in similar(lengths)]


def similar(lengths: list[int]) -> Iterator[slice]:
    """Runs of neighbours of which none is sqrt(2) times as long as another: few where the longest come first."""
    start, least, most = 0, lengths[0], lengths[0]
    for end, length in enumerate(lengths):
        least, most = min(least, length), max(most, length)
        if most**2 > 2 * least**2:
            yield slice(start, end)
            start, least, most = end, length, length
    yield slice(start, len(lengths))


class PackedAttention(MegatronModule):
    """Causal attention in which no response sees another: the packed tokens are laid out one response a row.

    A row's padding stands behind its tokens, so causality alone keeps it out of every output that is read. Queries and
    keys arrive unrotated; rotary embedding (arXiv 2104.09864 Eq 34, halves instead of pairs) has base ``rotary_base``,
    scaled by ``rope_scaling``. Under context parallelism a rank's tokens are swapped for all tokens of a part of its
    heads, and back.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        rotary_base: float,
        rope_scaling: RopeScaling | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None, "Megatron's attention hands its process groups on"
        self.cp = pg_collection.cp if pg_collection.cp.size() > 1 else None
        self.rotary = (rotary_base, rope_scaling)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [t, heads, d], key and value [t, kv heads, d] -> [t, heads * d]; t / cp under context parallelism."""
        assert isinstance(packed_seq_params, PackedSequences), "every microbatch is packed (PackedSequences)"
        if self.cp is None:
            return self._attend(query, key, value, packed_seq_params)
        shared = context.repeats(key.shape[1], self.cp)
        if shared > 1:
            key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        query, key, value = context.to_heads([query, key, value], self.cp)
        output = self._attend(query, key, value, packed_seq_params)
        return context.to_tokens(output.unflatten(1, (-1, query.shape[2])), self.cp).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """query [t, heads, d], key and value [t, kv heads, d] -> [t, heads * d]."""
        table = _rotation(packed.max_seqlen_q, query.shape[-1], *self.rotary, query.dtype, query.device)
        sizes = [len(view.places) for view in packed.views]
        parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), packed.views, strict=True)
        return torch.cat([self._attend_rows(*part, table) for part in parts])

    def _attend_rows(
        self, query: Tensor, key: Tensor, value: Tensor, view: PaddedView, table: tuple[Tensor, Tensor]
    ) -> Tensor:
        """``_attend`` over the tokens of one view."""
        rows, longest = view.tokens.shape
        index = view.tokens.flatten()

        def pad(tensor: Tensor) -> Tensor:  # [t, h, d] -> [s, h, L, d]
            return tensor.index_select(0, index).view(rows, longest, *tensor.shape[1:]).transpose(1, 2)

        repeat = query.shape[1] // key.shape[1]
        query, key, value = _rotate(pad(query), table), _rotate(pad(key), table), pad(value)
        if repeat > 1:
            key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
        dropout = self.dropout if self.training else 0.0
        with self._dropout_stream(dropout):
            output = F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=True, scale=self.scale
            )
        return output.transpose(1, 2).reshape(rows * longest, -1).index_select(0, view.places)

    def _dropout_stream(self, dropout: float) -> AbstractContextManager[None]:
        """Masks of its own for each tensor-parallel rank; under sequence parallelism the whole block has them."""
        if dropout and not self.config.sequence_parallel:
            return get_cuda_rng_tracker().fork()
        return nullcontext()


def rotary_frequencies(size: int, base: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """[size / 2] fp32, radians per position."""
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    if scaling is None:
        return frequencies
    # turns that a frequency makes over the original positions, placed between the two bounds
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


@functools.lru_cache(maxsize=2)  # for the layers of a microbatch; lengths hardly ever come again
def _rotation(
    length: int, size: int, base: float, scaling: RopeScaling | None, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(cos, sin) [length, size] of position times frequency; sin carries the sign of its half."""
    frequencies = rotary_frequencies(size, base, scaling, device)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=1).to(dtype), torch.cat([-sin, sin], dim=1).to(dtype)


def _rotate(tensor: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """[..., L, d] with each pair (x_i, x_i+d/2) turned by its position's angle; the table may be longer."""
    cos, sin = (part[: tensor.shape[-2]] for part in table)
    return torch.addcmul(tensor * cos, tensor.roll(tensor.shape[-1] // 2, -1), sin)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as megatron's specs call it; under sequence parallelism its gradient is summed over tp."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
