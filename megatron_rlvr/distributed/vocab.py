"""Token statistics over logits whose vocabulary columns are sharded over the tensor-parallel ranks.

One forward gives, per token: log-prob of the target and its rank, entropy, largest log-prob, sum of squared
probabilities, kept mass and proxy log-prob of Lp-Reg (arXiv 2510.03222v2, Eq 5); where asked, the most probable tokens,
and the KL divergence of an older policy's. Rank r holds columns [r * V/tp, (r + 1) * V/tp). Two collectives with a
min-p threshold or none, three with a fixed one, 28 bytes per token, 4 more for a fixed threshold and 4 for an older
policy's KL, and none in the backward: every rank turns the (equal) upstream gradients into the gradient of its own
columns.

vocab_formulas.py has the formulas, vocab_passes.py the loops over the logits; vocab_linear.py gives the same statistics
where there are no logits, but hidden states and the output layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rlvr.distributed import vocab_formulas, vocab_passes
from megatron_rlvr.distributed.vocab_formulas import Shard, StatisticsOptions, Tokens

__all__ = ["StatisticsOptions", "TokenStatistics", "token_statistics"]


@dataclass(frozen=True)
class TokenStatistics:
    """Per token, [T] fp32 (fp64 for fp64 logits) where nothing else is said, equal on every tensor-parallel rank.

    Gradients flow through ``log_prob``, ``entropy``, ``log_kept_mass`` and ``old_kl``; the others are detached.
    Uniform over 4 tokens, no threshold: log_prob = -1.386, entropy = 1.386, max_log_prob = -1.386, sum_squares = 0.25,
    log_kept_mass = 0, proxy_log_prob = -1.386, rank = 1.
    """

    log_prob: Tensor  # of the target
    entropy: Tensor  # nats
    max_log_prob: Tensor
    sum_squares: Tensor  # sum of p^2 over the vocabulary: the chance that two samples agree
    log_kept_mass: Tensor  # ln Z <= 0; 0 without a threshold and where a fixed one keeps nothing
    proxy_log_prob: Tensor  # ln q of the target; -inf where the threshold filters it
    rank: Tensor  # of the target: 1 and the number of tokens with a larger logit
    old_kl: Tensor | None = None  # with old_top: KL(q_old || p); 0 where nothing was kept
    # with top = K: the K most probable of the kept tokens, or of all without a threshold, the most probable first; the
    # target, where it is kept, is one of them
    top_ids: Tensor | None = None  # [T, K] int64; -1 behind the last kept one
    top_log_probs: Tensor | None = None  # [T, K] ln p; -inf behind the last kept one
    top_cut: Tensor | None = None  # [T] bool: the threshold keeps more than these K


DETACHED = ("max_log_prob", "sum_squares", "proxy_log_prob", "rank", "top_ids", "top_log_probs", "top_cut")


def token_statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    min_p: float | None = None,
    tau: float | None = None,
    threshold_temperature: float = 1.0,
    top: int = 0,
    old_top: tuple[Tensor, Tensor] | None = None,
    overwrite: bool = False,
) -> TokenStatistics:
    """Statistics of this rank's ``logits`` [T, V/tp] (any float dtype, maths in fp32 or fp64) at ``targets`` [T] int64.

    ``vocab_size`` is the number of real columns over all ranks; those behind it are padding and take no part. A target
    that is padding, outside every shard, or at a logit of -inf has log_prob -inf. StatisticsOptions explains
    ``temperature`` to ``top`` and holds them together (``**vars(options)``). ``old_top`` is an older policy's
    (top_ids, top_log_probs), renormalised to q_old; no id twice in a row.

    The gradient has the dtype of the logits; ``overwrite`` lets the backward write it over them, for logits that
    nothing else reads: then no matrix beside them ever exists. Collectives: forward 2, one more with ``tau`` and one
    with ``top``; backward 0 (the upstream gradient must be equal on every rank of ``group``). Raises ValueError when
    the shapes do not fit, ConfigError for an option that breaks its rule.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        shapes = f"{list(logits.shape)} and {list(targets.shape)}"
        raise ValueError(f"token_statistics takes logits [T, V/tp] and targets [T], not {shapes}")
    options = StatisticsOptions(temperature, min_p, tau, threshold_temperature, top)
    shard = Shard.of(logits.shape[1], vocab_size, group)
    tokens = Tokens.of(targets, old_top, vocab_passes.maths(logits.dtype))
    return TokenStatistics(*_TokenStatistics.apply(logits, tokens, shard, options, overwrite))


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tokens, shard: Shard, options: StatisticsOptions, overwrite: bool
    ) -> tuple[Tensor | None, ...]:
        measured = vocab_formulas.measure(logits.detach()[:, : shard.real], tokens, shard, options)
        values, state = vocab_formulas.derive(measured, tokens, shard, options)
        ctx.save_for_backward(logits, *state, *tokens)
        ctx.shard, ctx.options, ctx.overwrite = shard, options, overwrite
        mark_detached(ctx, values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, *saved = ctx.saved_tensors
        state, tokens = vocab_formulas.State(*saved[:5]), Tokens(*saved[5:])
        gradient = logits.detach() if ctx.overwrite else logits.detach().clone()
        real = gradient[:, : ctx.shard.real]
        gradient[:, ctx.shard.real :] = 0.0
        vocab_formulas.overwrite_with_gradient(real, tokens, state, upstream, ctx.shard, ctx.options)
        return gradient, None, None, None, None


def mark_detached(ctx: Any, values: tuple[Tensor | None, ...]) -> None:
    """Tell autograd which of the fields' ``values`` carry no gradient, and not to invent zeros for the others."""
    names = TokenStatistics.__dataclass_fields__
    detached = [value for name, value in zip(names, values, strict=True) if name in DETACHED and value is not None]
    ctx.mark_non_differentiable(*detached)
    ctx.set_materialize_grads(False)
