"""Microbatches through Megatron's pipeline schedules: the one file that knows how those treat losses and gradients.

Megatron would divide a loss by its number of microbatches, or gradients by a token count of its own. Here a loss
arrives already divided by its global denominator, so both divisions are switched off and gradients are plain sums
over microbatches and data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rlvr import platform, watchdog
from megatron_rlvr.distributed.context import stretch
from megatron_rlvr.distributed.groups import group_size
from megatron_rlvr.models.attention import PackedSequences
from megatron_rlvr.types import Microbatch

# What the last stage makes of its output [t, ...]; in a training pass the scalar loss. Under sequence or context
# parallelism the output may be a part of the microbatch's tokens, and of some padding behind them.
Consumer = Callable[[Tensor, Microbatch], Any]


def forward(
    chunks: list[torch.nn.Module], microbatches: list[Microbatch], consume: Consumer, cp: ProcessGroup | None = None
) -> list[Any]:
    """Forward only, no gradients. On the last stage: what ``consume`` returns for each microbatch; elsewhere []."""
    with torch.no_grad():
        return _run(chunks, microbatches, consume, cp, forward_only=True)


def forward_backward(
    chunks: list[torch.nn.Module], microbatches: list[Microbatch], loss: Consumer, cp: ProcessGroup | None = None
) -> list[Any]:
    """Gradients of the sum of ``loss`` over microbatches and data-parallel ranks, reduced and ready to step.

    ``loss`` returns the microbatch's share of the global loss, a scalar, the same on the ranks of ``cp``, which have a
    part of its gradient each. On the last stage the losses come back, detached; elsewhere [].
    """
    return _run(chunks, microbatches, loss, cp, forward_only=False)


def sum_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None, **groups: Any) -> None:
    """Megatron's reduction of gradients without its division by a token count."""
    finalize_model_grads(model, None, **groups)


def _run(
    chunks: list[torch.nn.Module],
    microbatches: list[Microbatch],
    consume: Consumer,
    cp: ProcessGroup | None,
    forward_only: bool,
) -> list[Any]:
    if not microbatches:
        raise ValueError("a pass needs at least one microbatch")
    with platform.megatron_calls():
        return get_forward_backward_func()(
            forward_step_func=_forward_step(consume, cp, forward_only),
            data_iterator=[iter(microbatches) for _ in chunks] if len(chunks) > 1 else iter(microbatches),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(microbatches),
            seq_length=microbatches[0].num_tokens,  # each send carries its own shape (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def _forward_step(consume: Consumer, cp: ProcessGroup | None, forward_only: bool) -> Callable:
    def step(data: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        watchdog.alive()
        micro = next(data)
        inputs, packed = model_inputs(micro, _sequence_multiple(model), cp)
        output = model(input_ids=inputs[0], position_ids=inputs[1], attention_mask=None, packed_seq_params=packed)

        def finish(output: Tensor, non_loss_data: bool = False) -> Any:
            # Views alone, where no token is padding: indexing would copy the gradient of all logits. Tokens that are
            # dealt out to ranks stay as they are: each rank has equally many.
            output = output.flatten(0, 1)
            padded = cp is None and len(output) > micro.num_tokens
            result = consume(output[: micro.num_tokens] if padded else output, micro)
            if forward_only:
                return result
            # The token count goes unused: sum_gradients drops it.
            return result, torch.zeros([], dtype=torch.int, device=result.device), result.detach()

        return output, finish

    return step


def _sequence_multiple(model: Any) -> int:
    config = model.config
    return config.tensor_model_parallel_size if config.sequence_parallel else 1


def model_inputs(
    micro: Microbatch, multiple: int = 1, cp: ProcessGroup | None = None
) -> tuple[tuple[Tensor, Tensor], PackedSequences]:
    """((token_ids [1, t'], position_ids [1, t']), packing): t' is t rounded up to a multiple.

    Sequence parallelism cuts the tokens into tp equal parts, so the remainder is filled by one more sequence of
    token 0 that nobody reads. Context parallelism cuts them before that: this rank has t' / cp of them, and the packing
    is that of all.
    """
    pad = -micro.num_tokens % (multiple * group_size(cp))
    cu_seqlens, token_ids, position_ids = micro.cu_seqlens, micro.token_ids, micro.position_ids
    if pad:
        cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:] + pad])
        token_ids = F.pad(token_ids, (0, pad))
        position_ids = torch.cat([position_ids, torch.arange(pad, device=position_ids.device)])
    token_ids, position_ids = (stretch(values, multiple, cp) for values in (token_ids, position_ids))
    return (token_ids[None], position_ids[None]), PackedSequences.from_cu_seqlens(cu_seqlens)
