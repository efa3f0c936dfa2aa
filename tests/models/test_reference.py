"""The reference gives the log-probs of the model that the run starts from, however far the policy has moved."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import KlConfig
from megatron_rlvr.losses import kl_penalty, reduction_weights
from megatron_rlvr.models.policy import Reference
from tests.models.layouts import EVERYTHING, OPTIONS, Layout, make_batch, make_policy, megatron
from tests.models.reference import Sample
from tests.ranks import run_ranks
from tests.tiny import make_config, make_folder, make_groups

KL = KlConfig(coefficient=0.5, estimator="k2")


def kl_loss(update, micro, current, meter):
    """Only the distance from the reference."""
    return (reduction_weights(micro, update, "token_mean") * kl_penalty(micro, current.log_prob, KL, meter)).sum()


def test_the_reference_stays_where_the_policy_started(tmp_path: Path) -> None:
    make_folder(tmp_path, "qwen3", True)
    groups, layout = make_groups(prompts=2, responses=2), Layout(tp=2, pp=2)

    def work() -> tuple[dict[str, float], dict[str, float], float]:
        with megatron(layout) as ranks:
            policy = make_policy(tmp_path, layout, ranks, optimizer={"lr": 1e-2})
            resting = make_policy(tmp_path, layout, ranks, optimizer={"lr": 1e-30})
            config = make_config(tmp_path, {"parallel": vars(layout)})
            reference = Reference(config, Architecture.from_folder(tmp_path), ranks)
            assert not any(parameter.requires_grad for chunk in reference.chunks for parameter in chunk.parameters())
            batch = make_batch(groups, samples, layout, ranks, EVERYTHING)
            old = policy.fill_log_probs(batch, OPTIONS)
            first = reference.fill_log_probs(batch, OPTIONS)
            # not bit for bit: the policy's parameters are aligned otherwise in memory, inside a buffer
            assert torch.allclose(batch.ref_log_probs, batch.old_log_probs, atol=1e-5)
            assert torch.allclose(first.proxy_log_prob, old.proxy_log_prob, atol=1e-5)
            kept = batch.ref_log_probs.clone()
            loss = partial(kl_loss, batch.updates[0])
            still = resting.update(batch, batch.updates[0], loss, OPTIONS).means()
            batch.ref_log_probs = kept - 1.0  # as if the policy had left the reference: k2 is half a nat squared
            pulled = policy.update(batch, batch.updates[0], loss, OPTIONS).means()
            policy.fill_log_probs(batch, OPTIONS)
            reference.fill_log_probs(batch, OPTIONS)
            assert torch.equal(batch.ref_log_probs, kept)
            return still, pulled, float((batch.old_log_probs - kept).abs().max())

    samples = {
        index: Sample([], rollout.response_ids, *torch.zeros(2, len(rollout.response_ids)))
        for index, rollout in enumerate(rollout for group in groups for rollout in group.rollouts)
    }
    for still, pulled, moved in run_ranks(4, work, timeout=120):
        assert max(still["policy/ref_kl"], still["policy/loss"]) < 1e-9 and still["policy/grad_norm"] < 1e-3
        assert pulled["policy/loss"] == pytest.approx(KL.coefficient * pulled["policy/ref_kl"])
        assert pulled["policy/ref_kl"] == pytest.approx(0.5, abs=1e-4)
        assert pulled["policy/grad_norm"] > 0 and moved > 1e-3
