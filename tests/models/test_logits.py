"""One packed forward: the logits are those of transformers, response by response, and no response sees another."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.models.attention import PackedSequences
from megatron_rlvr.models.build import output_weight
from megatron_rlvr.models.policy import Policy
from megatron_rlvr.models.schedule import model_inputs
from megatron_rlvr.types import Batch
from tests.models.conftest import Case
from tests.models.layouts import EVERYTHING, OPTIONS, Layout, make_batch, make_policy, megatron
from tests.ranks import run_ranks
from tests.tiny import VOCAB

LOGITS = 4e-5  # absolute, of logits up to about 6; transformers' own attention kernels differ by 1e-5, a GPU's by 2e-5


def _on_policy(check: Callable[[Policy, Case], object], cases: dict[str, Case], layout: Layout) -> list[object]:
    with megatron(layout) as ranks:
        return [check(make_policy(case.folder, layout, ranks), case) for case in cases.values()]


def _batch(policy: Policy, case: Case) -> Batch:
    batch = make_batch(case.groups, case.samples, Layout(), policy.groups, EVERYTHING)
    assert len(batch.updates[0].microbatches) == 1
    assert len(PackedSequences.from_cu_seqlens(batch.cu_seqlens).views) > 1  # attention takes it in parts
    return batch


def _logits(policy: Policy, case: Case) -> list[tuple[list[int], Tensor]]:
    """(tokens, logits [t, V]) per response of one microbatch that holds them all."""
    batch = _batch(policy, case)
    (logits,) = policy.forward(batch.microbatches(), lambda output, micro: output[:, :VOCAB].clone())
    bounds = batch.cu_seqlens.tolist()
    return [(batch.token_ids[low:high].tolist(), logits[low:high].cpu().numpy()) for low, high in pairwise(bounds)]


def test_packed_logits_equal_transformers(cases: dict[str, Case]) -> None:
    (found,) = run_ranks(1, _on_policy, _logits, cases, Layout(), timeout=60)
    for case, responses in zip(cases.values(), found, strict=True):
        model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32)
        assert len(responses) == 12 and len({len(tokens) for tokens, _ in responses}) > 3
        with torch.no_grad():
            gaps = [
                float((model(torch.tensor([tokens])).logits[0] - torch.from_numpy(logits)).abs().max())
                for tokens, logits in responses
            ]
        assert max(gaps) < LOGITS, case.name
        print(f"\n{case.name}: logits {max(gaps):.1e}")


def _head(policy: Policy, case: Case) -> tuple[float, float]:
    """Largest log-prob's distance from that of fp64 logits of the same hidden states, and the largest logit."""
    batch = _batch(policy, case)
    (hidden,) = policy.forward(batch.microbatches(), lambda output, micro: output.double())
    logits = (hidden.view(batch.num_tokens, -1) @ output_weight(policy.chunks[-1]).double().t())[:, :VOCAB]
    exact = (logits / OPTIONS.temperature).log_softmax(1).gather(1, batch.target_ids[:, None])[:, 0]
    found = policy.fill_log_probs(batch, OPTIONS).log_prob
    return float((found - exact).abs()[batch.loss_mask].max()), float(logits.max())


def test_a_bf16_policy_with_float32_logits_is_as_exact_as_its_hidden_states(cases: dict[str, Case]) -> None:
    case = cases["qwen2-untied"]

    def work() -> list[tuple[float, float]]:
        with megatron(Layout()) as ranks:
            models = [{"dtype": "bfloat16", "logits": logits} for logits in ("fused", "fused_float32")]
            return [_head(make_policy(case.folder, Layout(), ranks, model=model), case) for model in models]

    ((rounded, largest), (wide, _)), *_ = run_ranks(1, work, timeout=60)
    assert largest > 4 and wide < 1e-5 and rounded > 200 * wide


def _change_one(policy: Policy, case: Case) -> dict[str, bool]:
    batch, changed = _batch(policy, case), _batch(policy, case)
    low, high = changed.cu_seqlens[3:5].tolist()
    changed.token_ids[low:high] = (changed.token_ids[low:high] + 7) % VOCAB
    before, after = policy.fill_log_probs(batch, OPTIONS), policy.fill_log_probs(changed, OPTIONS)
    inside = batch.response_index == 3
    others = batch.loss_mask & ~inside
    return {
        "others": torch.equal(before.log_prob[others], after.log_prob[others]),
        "itself": torch.equal(before.log_prob[inside & batch.loss_mask], after.log_prob[inside & batch.loss_mask]),
        "zero outside": not batch.old_log_probs[~batch.loss_mask].any() and not batch.entropy[~batch.loss_mask].any(),
    }


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sequence_parallel=True), Layout(cp=2)], ids=str)
def test_changing_one_response_leaves_the_others_bit_identical(layout: Layout, cases: dict[str, Case]) -> None:
    for results in run_ranks(layout.ranks, _on_policy, _change_one, cases, layout, timeout=60):
        assert results == [{"others": True, "itself": False, "zero outside": True}] * len(cases)


def _old_kl(policy: Policy, case: Case) -> list[float]:
    """Largest |KL(q_old || p) + ln Z| on this rank's last stage, of a policy that has not moved; the widest list."""
    batch = make_batch(case.groups, case.samples, Layout(), policy.groups, 80)
    old = policy.fill_log_probs(batch, replace(OPTIONS, top=VOCAB))
    assert old.top_ids.equal(batch.old_top_ids) and old.top_cut.shape == (batch.num_tokens,)
    assert not old.top_cut.any() and old.top_log_probs[:, 0].equal(old.max_log_prob)
    parts = policy.forward(batch.microbatches(), lambda output, micro: policy.statistics(output, micro, OPTIONS))
    return [float((part.old_kl + part.log_kept_mass).abs().max()) for part in parts]


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(cp=2)], ids=str)
def test_the_old_policys_kept_set_reaches_the_statistics_of_the_update(layout: Layout, cases: dict[str, Case]) -> None:
    """All of its kept set is there, so while the policy stays as it is the KL to it is -ln Z."""
    *_, last = run_ranks(layout.ranks, _on_policy, _old_kl, dict(list(cases.items())[:1]), layout, timeout=60)
    assert last and last[0] and max(last[0]) < 1e-5


def _states(policy: Policy, case: Case) -> dict[str, list]:
    """Kind -> the states of this rank's responses, and afterwards the log-probs as they were before."""
    batch = make_batch(case.groups, case.samples, Layout(), policy.groups, 60)
    assert len(batch.microbatches()) > 2
    before, found = policy.fill_log_probs(batch, OPTIONS).log_prob, {}
    for which in ("last", "second_last", "mean"):
        policy.fill_states(batch, which)
        found[which] = batch.states.tolist()
    assert policy.fill_log_probs(batch, OPTIONS).log_prob.equal(before)
    return found | {"tokens": [batch.token_ids[low:high].tolist() for low, high in pairwise(batch.cu_seqlens.tolist())]}


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2, pp=2, sequence_parallel=True), Layout(tp=2, cp=2, sequence_parallel=True)],
    ids=str,
)
def test_states_of_whole_responses_equal_transformers(layout: Layout, cases: dict[str, Case]) -> None:
    chosen = {name: cases[name] for name in ("qwen3-tied", "qwen2-untied")}
    for found in run_ranks(layout.ranks, _on_policy, _states, chosen, layout, timeout=60):
        for case, states in zip(chosen.values(), found, strict=True):
            model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32).model
            with torch.no_grad():
                hidden = [model(torch.tensor([tokens])).last_hidden_state[0] for tokens in states["tokens"]]
            expected = {
                "last": [rows[-1] for rows in hidden],
                "second_last": [rows[-2] for rows in hidden],
                "mean": [rows.mean(0) for rows in hidden],
            }
            for which, rows in expected.items():
                assert float((torch.tensor(states[which]) - torch.stack(rows)).abs().max()) < LOGITS, which


def test_packed_sequences_describe_the_padded_views() -> None:
    packed = PackedSequences.from_cu_seqlens(torch.tensor([0, 4, 7, 8], dtype=torch.int32))
    assert [view.tokens.tolist() for view in packed.views] == [[[0, 1, 2, 3], [4, 5, 6, 6]], [[0]]]
    assert [view.places.tolist() for view in packed.views] == [[0, 1, 2, 3, 4, 5, 6], [0]]
    assert (packed.max_seqlen_q, packed.max_seqlen_kv, packed.qkv_format) == (4, 4, "thd")


def test_padded_views_hold_every_response_and_little_padding() -> None:
    draw = random.Random(0)
    for _ in range(200):
        lengths = [int(draw.paretovariate(0.7)) % 900 + 1 for _ in range(draw.randint(1, 40))]
        if longest_first := draw.random() < 0.5:
            lengths.sort(reverse=True)
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        packed = PackedSequences.from_cu_seqlens(cu_seqlens)
        sizes = [len(view.places) for view in packed.views]
        assert sum(view.tokens.numel() for view in packed.views) <= 2**0.5 * sum(lengths)
        found: list[int] = []
        for view, tokens in zip(packed.views, torch.arange(sum(lengths)).split(sizes), strict=True):
            padded = tokens[view.tokens]
            assert padded.flatten()[view.places].equal(tokens)
            found += padded[:, 0].tolist()
        assert found == cu_seqlens[:-1].tolist()  # a row each, from its first token on
        if longest_first:
            assert len(packed.views) <= 20  # as often 900 is divided by sqrt(2)


def test_sequence_parallel_padding_is_one_more_sequence(cases: dict[str, Case]) -> None:
    case = next(iter(cases.values()))
    batch = make_batch(case.groups, case.samples, Layout(), ParallelGroups.single(), EVERYTHING)
    micro = batch.microbatches()[0]
    multiple = micro.num_tokens + 3
    (token_ids, position_ids), packed = model_inputs(micro, multiple)
    assert token_ids.shape == position_ids.shape == (1, multiple)
    assert token_ids[0, : micro.num_tokens].equal(micro.token_ids)
    assert position_ids[0, -3:].tolist() == [0, 1, 2]
    assert packed.cu_seqlens_q[:-1].equal(micro.cu_seqlens) and packed.cu_seqlens_q[-1] == multiple
    (unpadded, _), packed = model_inputs(micro, micro.num_tokens)
    assert unpadded[0].equal(micro.token_ids) and packed.cu_seqlens_q.equal(micro.cu_seqlens)
