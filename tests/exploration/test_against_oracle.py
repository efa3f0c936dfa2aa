"""Losses and methods against the fp64 oracle, value and gradient, however ranks and microbatches share the responses.

What is taken over the update has to come out the same in every layout; what is taken over a microbatch is checked
against an oracle that sees the same microbatches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rlvr import losses
from megatron_rlvr.config import Config, KlConfig, TrainerConfig
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.vocab import token_statistics
from megatron_rlvr.exploration.base import build
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Batch
from tests import oracle
from tests.exploration.toy import deal, fill_old, make_batch, make_logits
from tests.ranks import run_ranks

LENGTHS = [9, 4, 12, 7, 15, 6, 11, 8]
LENGTH = 16  # what sequence_sum divides by
KAPPA = 0.05
OFF_POLICY = Config(trainer=TrainerConfig(updates_per_rollout=4))


@dataclass
class Case:
    """A loss and a method by their names in the config, and the oracle's version of each."""

    loss: str = "ppo"
    clip: tuple[float, ...] = (0.2, 0.28)
    method: dict[str, dict[str, Any]] = field(default_factory=dict)
    shape: Callable[[oracle.Tokens, Tensor], Tensor] = lambda tokens, values: values
    reduction: str = "token_mean"
    kl: str = ""  # estimator of the distance from the reference

    def expected(self, tokens: oracle.Tokens) -> Tensor:
        values = getattr(oracle, self.loss)(tokens, *self.clip)
        reduce = getattr(oracle, self.reduction)
        options = {"length": LENGTH} if self.reduction == "sequence_sum" else {}
        values = self.shape(tokens, values)
        if self.kl:
            values = oracle.kl(tokens, values, reference_logits(tokens.mask), 0.3, self.kl)
        return reduce(tokens, values, **options)


def correction(form: str, low: float, high: float, renormalise: bool = False) -> Case:
    options = {"form": form, "low": low, "high": high, "renormalise": renormalise}
    shape = partial(oracle.rollout_correction, form=form, low=low, high=high, renormalise=renormalise)
    return Case(method={"rollout_correction": options}, shape=shape)


def protected(strength: Callable, **options: Any) -> Case:
    chosen = partial(oracle.lowest, share_of_all=0.1)
    shape = partial(oracle.lp_reg, kappa=KAPPA, chosen=chosen, strength=strength)
    options |= {"kappa": KAPPA, "target_share": 0.1, "divergence": "k3_sampled"}
    return Case("plain_clip", (1.0, 9.0), {"lp_reg": options}, shape)


def reference_logits(mask: Tensor) -> Tensor:
    return make_logits(make_batch(LENGTHS), seed=7)[mask]


CASES = {
    "grpo": Case(reduction="sequence_mean"),
    "dr_grpo": Case(reduction="sequence_sum"),
    "dual clip": Case(clip=(0.2, 0.2, 3.0)),
    "plain_clip": Case("plain_clip", (1.0, 9.0)),
    "gspo": Case("gspo", (3e-4, 4e-4), reduction="sequence_mean"),
    "cispo": Case("cispo", (1.0, 0.2)),
    "dppo_tv": Case("dppo_tv", (0.05, 0.1)),
    "dppo_kl": Case("dppo_kl", (0.01, 0.02)),
    **{f"kl in the loss, {estimator}": Case(kl=estimator) for estimator in ("k1", "k2", "k3")},
    "kl_cov": Case(
        "unclipped",
        method={"kl_cov": {"share": 0.1, "coefficient": 2.0}},
        shape=partial(oracle.kl_cov, share=0.1, coefficient=2.0),
    ),
    "clip_cov": Case(
        method={"clip_cov": {"share": 0.05, "low": 0.1, "high": 2.0}},
        shape=partial(oracle.clip_cov, share=0.05, low=0.1, high=2.0),
    ),
    "high_entropy": Case(method={"high_entropy": {}}, shape=partial(oracle.high_entropy, share=0.2)),
    "stapo": Case(method={"stapo": {"tau": 0.1, "quantile": 0.8}}, shape=partial(oracle.stapo, tau=0.1, quantile=0.8)),
    "entropy_bonus": Case(
        method={"entropy_bonus": {"coefficient": 0.1}}, shape=partial(oracle.entropy_bonus, coefficient=0.1)
    ),
    "tis": correction("tis", 0.0, 2.0),
    "sequence_tis": correction("sequence_tis", 0.0, 2.0),
    "mis": correction("mis", 0.0, 1.2),
    "sequence_mis": correction("sequence_mis", 0.0, 1.5, renormalise=True),
    "icepop": correction("icepop", 0.5, 1.6),
    "geometric_mask": correction("geometric_mask", 0.9, 1.1, renormalise=True),
    "lp_reg": Case(
        "plain_clip",
        (1.0, 9.0),
        {"lp_reg": {"kappa": KAPPA, "rho": 0.6, "beta": 2.0}},
        partial(oracle.lp_reg_full, kappa=KAPPA, rho=0.6, beta=2.0),
    ),
    "lp_reg, target_share": protected(lambda a: 1.0),
    "lp_reg, beta in proportion to |A|": protected(lambda a: 3.0 * a, beta="advantage", protection=3.0),
    "composed": Case(
        method={"entropy_bonus": {"coefficient": 0.1}, "high_entropy": {}, "clip_cov": {"share": 0.05, "low": 0.1}},
        shape=lambda t, values: oracle.entropy_bonus(
            t,
            oracle.high_entropy(t, oracle.clip_cov(t, values, share=0.05, low=0.1, high=5.0), share=0.2),
            coefficient=0.1,
        ),
    ),
}
# Data-parallel ranks, each with its microbatches, each with its responses.
LAYOUTS = {
    "one microbatch": [[[0, 1, 2, 3, 4, 5, 6, 7]]],
    "eight microbatches": [[[5], [2], [7], [0], [3], [1], [6], [4]]],
    "two ranks": [[[4, 0], [6]], [[1, 3], [7, 2, 5]]],
}


def problem() -> tuple[Batch, Tensor, Tensor]:
    """(batch, old logits, current logits): an update that is not the first after its rollout."""
    batch, old_logits = make_batch(LENGTHS), make_logits(make_batch(LENGTHS), scale=1.5)
    noise = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(9))
    old = old_logits.log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
    batch.rollout_log_probs = torch.where(batch.loss_mask, old.float() + 0.3 * noise, 0.0)
    everywhere = torch.ones_like(batch.loss_mask)
    reference = reference_logits(everywhere).log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
    batch.ref_log_probs = torch.where(batch.loss_mask, reference, torch.nan)
    return batch, old_logits, old_logits + 0.4 * make_logits(batch, seed=1)


def package_loss(case: Case, microbatches: list[list[int]], groups: ParallelGroups) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's share of the loss, and of its gradient: (loss, rows, [rows, its columns of the vocabulary])."""
    whole, old_logits, logits = problem()
    method = build(case.method, OFF_POLICY)
    batch, rows = deal(fill_old(whole, old_logits, method), microbatches)
    (update,), total = batch.updates, torch.zeros((), dtype=torch.float64)
    columns = -(-logits.shape[1] // groups.tp_size)
    padded = torch.nn.functional.pad(logits[rows], (0, columns * groups.tp_size - logits.shape[1]))
    leaf = padded[:, groups.tp_rank * columns :][:, :columns].clone().requires_grad_()
    method.prepare_update(batch, update, groups)
    if not groups.is_last_stage:  # which has no logits
        return total, rows, torch.zeros_like(leaf)
    for start, stop in update.microbatches:
        micro = batch.microbatch(start, stop)
        current = token_statistics(
            leaf[int(batch.cu_seqlens[start]) : int(batch.cu_seqlens[stop])],
            micro.target_ids,
            group=groups.tp,
            vocab_size=logits.shape[1],
            old_top=(micro.old_top_ids, micro.old_top_log_probs) if micro.has("old_top_ids") else None,
            **vars(method.needs().statistics(1.0)) | {"top": 0},
        )
        values, _ = losses.LOSSES[case.loss](current.log_prob, micro, losses.Clip(*case.clip))
        values = method.policy_loss(values, micro, current, Meter())
        if case.kl:
            values = values + losses.kl_penalty(micro, current.log_prob, KlConfig(0.3, case.kl), Meter())
        weights = losses.reduction_weights(micro, update, case.reduction, LENGTH)
        total = total + torch.where(micro.loss_mask, weights * values, 0.0).sum()
    return total.detach(), rows, torch.autograd.grad(total, leaf)[0]


def oracle_loss(case: Case) -> tuple[Tensor, Tensor]:
    batch, old_logits, logits = problem()
    leaf = logits.clone().requires_grad_()
    loss = case.expected(oracle.Tokens.of(batch, old_logits, leaf))
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def check(name: str, parts: list[list[tuple[Tensor, Tensor, Tensor]]]) -> None:
    """``parts[dp][tp]``: what the ranks found."""
    expected, expected_gradient = oracle_loss(CASES[name])
    gradient = torch.zeros_like(expected_gradient)
    for shards in parts:
        gradient[shards[0][1]] = torch.cat([shard[2] for shard in shards], dim=1)[:, : gradient.shape[1]]
    total = sum(float(shards[0][0]) for shards in parts)
    assert total == pytest.approx(float(expected), rel=2e-6), name
    assert torch.allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-8), name
    if CASES[name].method:  # which has to have had something to do
        plain = dataclasses.replace(CASES[name], shape=lambda tokens, values: values)
        assert not torch.allclose(oracle_loss(plain)[1], expected_gradient, atol=1e-4), name


@pytest.mark.parametrize("layout", ["one microbatch", "eight microbatches"])
@pytest.mark.parametrize("name", CASES)
def test_on_one_rank(name, layout):
    (microbatches,) = LAYOUTS[layout]
    check(name, [[package_loss(CASES[name], microbatches, ParallelGroups.single())]])


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_on_two_data_parallel_ranks(tp, pp):
    """Every stage takes part in what is decided before the update; the last one has the logits."""

    def work():
        groups = ParallelGroups.from_grid(tp=tp, pp=pp, dp=2)
        losses = [package_loss(case, LAYOUTS["two ranks"][groups.dp_rank], groups) for case in CASES.values()]
        return losses if groups.is_last_stage else None

    found = [losses for losses in run_ranks(2 * tp * pp, work, timeout=120) if losses]
    for place, name in enumerate(CASES):
        check(name, [[found[dp * tp + rank][place] for rank in range(tp)] for dp in range(2)])


MICROBATCH_CASES = {
    "kl_cov": Case(
        "unclipped",
        method={"kl_cov": {"share": 0.1, "scope": "microbatch"}},
        shape=lambda t, values: oracle.kl_cov(t, values, share=0.1, coefficient=1.0, log_p=t.new),
    ),
    "clip_cov": Case(
        method={"clip_cov": {"share": 0.1, "low": 0.1, "scope": "microbatch"}},
        shape=partial(oracle.clip_cov, share=0.1, low=0.1, high=5.0, current=True),
    ),
    "high_entropy": Case(
        method={"high_entropy": {"scope": "microbatch"}},
        shape=lambda t, values: oracle.high_entropy(t, values, share=0.2, logits=t.logits),
    ),
}


@pytest.mark.parametrize("name", MICROBATCH_CASES)
def test_the_released_codes_take_each_microbatch_by_itself(name):
    """Token means of microbatches, weighed by their responses."""
    case, microbatches = MICROBATCH_CASES[name], [[5, 2, 0], [7, 3, 1, 6, 4]]
    case.reduction = "microbatch_token_mean"
    loss, rows, shard = package_loss(case, microbatches, ParallelGroups.single())
    batch, old_logits, logits = problem()
    leaf = logits.clone().requires_grad_()
    tokens, total = oracle.Tokens.of(batch, old_logits, leaf), torch.zeros((), dtype=torch.float64)
    for members in microbatches:
        micro = tokens.only(members)
        values = case.shape(micro, getattr(oracle, case.loss)(micro, *case.clip))
        total = total + values.mean() * len(members) / len(LENGTHS)
    expected = torch.autograd.grad(total, leaf)[0]
    assert float(loss) == pytest.approx(total.item(), rel=2e-6)
    assert torch.allclose(shard, expected[rows], rtol=1e-5, atol=1e-8)
