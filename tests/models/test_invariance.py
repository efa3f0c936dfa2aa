"""The invariance matrix: log-probs, loss and every gradient are those of one fp64 process, however the work is cut.

Tolerances are a few times the largest difference seen in fp32. With fp64 weights two of the layouts agreed to 1.2e-7 of
a tensor's largest gradient, which is the fp32 of the gradient buffers: what is left here is rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec, transformer_block

from megatron_rlvr import platform
from megatron_rlvr.distributed import vocab_linear
from megatron_rlvr.models import build
from megatron_rlvr.models.attention import RMSNorm
from tests.models.conftest import UNSCORED, Case
from tests.models.layouts import (
    EVERYTHING,
    LAYOUTS,
    OPTIONS,
    STILL,
    Layout,
    distance,
    gradients,
    make_batch,
    make_policy,
    megatron,
    run_update,
)
from tests.ranks import run_ranks
from tests.tiny import VOCAB

LOG_PROB = 2e-5  # nats
LOSS = 1e-6  # absolute, of a loss of order 0.1 to 1
GRADIENT = 3e-5  # of the tensor's largest entry
NORM = 1e-5  # relative

ONE_EACH = 28  # tokens: a response or two a microbatch
FUSED = [
    Layout(),
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2),
    Layout(tp=2, pp=2, sequence_parallel=True),
    Layout(tp=2, cp=2, sequence_parallel=True),
]
SIZES = {"qwen3": (ONE_EACH, 80, EVERYTHING), "qwen2": (80,)}  # tokens per microbatch


def _measure(layout: Layout, cases: dict[str, Case], sizes: dict, logits: str) -> list[dict[str, Any]]:
    with megatron(layout) as ranks:
        return [
            {"model": case.name, "microbatch_tokens": tokens} | figures
            for case in cases.values()
            for policy in [make_policy(case.folder, layout, ranks, optimizer=STILL, model={"logits": logits})]
            for tokens in sizes[case.name.split("-")[0]]
            for figures in [_measure_one(policy, case, layout, tokens)]
        ]


def _measure_one(policy: Any, case: Case, layout: Layout, tokens: int) -> dict[str, Any]:
    batch = make_batch(case.groups, case.samples, layout, policy.groups, tokens)
    found = policy.fill_log_probs(batch, OPTIONS).log_prob.cpu()
    batch = batch.to(torch.device("cpu"))
    log_prob = entropy = 0.0
    for place, identity in enumerate(batch.response_ids.tolist()):
        mask = batch.loss_mask & (batch.response_index == place)
        if identity in case.samples:
            log_prob = max(log_prob, float((found[mask] - case.log_probs[identity]).abs().max()))
            entropy = max(entropy, float((batch.entropy[mask] - case.entropies[identity]).abs().max()))
    # fill_log_probs has overwritten the samples' old log-probs, which are to differ from the policy's
    batch = make_batch(case.groups, case.samples, layout, policy.groups, tokens)
    metrics = run_update(policy, batch)
    gradient, worst = distance(policy, gradients(policy), case.gradients)
    return {
        "microbatches": len(batch.updates[0].microbatches),
        "log_prob": log_prob,
        "entropy": entropy,
        "loss": abs(metrics["policy/loss"] - case.loss),
        "norm": metrics["policy/grad_norm"],
        "gradient": gradient,
        "worst": worst,
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_loss_and_gradients_equal_one_fp64_process(layout: Layout, cases: dict[str, Case]) -> None:
    measured = _compare(layout, cases, SIZES, "materialised")
    assert len({figures["microbatches"] for figures in measured}) >= 2  # the sizes really cut the batch differently


@pytest.mark.parametrize("layout", FUSED, ids=str)
def test_and_so_without_logits(layout: Layout, cases: dict[str, Case]) -> None:
    """Tied and untied; blocks of 48 rows on two ranks, which cut every microbatch but the last."""
    both = {name: case for name, case in cases.items() if name in ("qwen3-tied", "qwen2-untied")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "logits_block_elements", lambda: 48 * VOCAB // layout.tp)
        patch.setattr(vocab_linear, "LEAST_ROWS", 1)
        _compare(layout, both, {"qwen3": (80,), "qwen2": (80,)}, "fused")


def _measure_with_engine_layers(*arguments: Any) -> list[dict[str, Any]]:
    """As if Transformer Engine were there: a spec whose core attention must not be run, since it cannot take cp."""

    def spec(num_experts: None = None, qk_layernorm: bool = False) -> ModuleSpec:
        found = get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm")
        layer, attention = found.submodules, found.submodules.self_attention.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
        attention.q_layernorm = attention.k_layernorm = RMSNorm
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "has_transformer_engine", lambda: True)
        patch.setattr(build, "get_gpt_layer_with_transformer_engine_spec", spec)
        patch.setattr(transformer_block, "LayerNormImpl", RMSNorm)
        for kernel in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
            patch.setattr(rope_utils, kernel, object())
        return _measure(*arguments)


@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(pp=2, cp=2)], ids=str)
def test_context_parallelism_brings_its_own_attention_into_other_layers(layout: Layout, cases: dict[str, Case]) -> None:
    case = {"qwen3-tied": cases["qwen3-tied"]}
    _compare(layout, case, {"qwen3": (80,)}, "materialised", _measure_with_engine_layers)


def _compare(layout: Layout, cases: dict[str, Case], sizes: dict, logits: str, measure: Callable = _measure) -> list:
    norms = {
        name: float(torch.stack([gradient.norm() for gradient in case.gradients.values()]).norm())
        for name, case in cases.items()
    }
    ranks = run_ranks(layout.ranks, measure, layout, cases, sizes, logits, timeout=100)
    measured = [figures for rank in ranks for figures in rank]
    assert {figures["model"] for figures in measured} == set(cases)
    for figures in measured:
        assert figures["log_prob"] < LOG_PROB, figures
        assert figures["entropy"] < LOG_PROB, figures
        assert figures["loss"] < LOSS, figures
        assert figures["norm"] == pytest.approx(norms[figures["model"]], rel=NORM), figures
        assert figures["gradient"] < GRADIENT, figures
    worst = {key: max(figures[key] for figures in measured) for key in ("log_prob", "entropy", "loss", "gradient")}
    off = max(abs(figures["norm"] / norms[figures["model"]] - 1) for figures in measured)
    print(f"\n{layout}: " + ", ".join(f"{key} {value:.1e}" for key, value in worst.items()) + f", norm {off:.1e}")
    return measured


def test_the_cases_exercise_every_part_of_the_loss(cases: dict[str, Case]) -> None:
    """Else the matrix could pass with a term that is always zero, or never clipped."""
    for case in cases.values():
        ratios = torch.cat([(case.log_probs[i] - sample.old_log_probs).exp() for i, sample in case.samples.items()])
        advantages = torch.cat([sample.advantages for sample in case.samples.values()])
        clipped = ((advantages > 0) & (ratios > 1.28)) | ((advantages < 0) & (ratios < 0.8))
        assert 0.1 < clipped.float().mean() < 0.9
        assert len({sample.response_ids for sample in case.samples.values()}) == 12 - len(UNSCORED)
        lengths = {len(sample.prompt_ids) + len(sample.response_ids) for sample in case.samples.values()}
        assert len(lengths) > 3
