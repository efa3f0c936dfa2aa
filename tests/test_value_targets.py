"""Advantages, returns and the heads' data: by hand on one rank, and the same on any number of ranks."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from megatron_rlvr.config import CriticConfig, KlConfig
from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.metrics import Meter
from megatron_rlvr.packing import pack
from megatron_rlvr.types import Batch
from megatron_rlvr.value_targets import fill_targets, head_choice
from tests.ranks import run_ranks
from tests.tiny import make_groups

SETTINGS = CriticConfig(num_heads=3, share=0.5, gamma=0.9, lam=0.8)
GROUPS = make_groups(prompts=6, responses=4, longest=9)
UNSCORED = (3, 20)  # one of each update


def _values(identity: int, length: int) -> Tensor:
    """[length, 3] of a response, wherever it is packed."""
    return torch.randn(length, 3, generator=torch.Generator().manual_seed(identity))


def _reward(identity: int) -> float:
    return float(torch.rand(1, generator=torch.Generator().manual_seed(100 + identity)))


def _filled(
    groups: ParallelGroups, microbatch_tokens: int, settings: CriticConfig = SETTINGS, seed: tuple[int, int] = (0, 5)
):
    """(batch, raw advantages, whitened ones, metrics) of this rank after the targets are filled, in two updates."""
    scored = [
        [None if row * 4 + column in UNSCORED else _reward(row * 4 + column) for column in range(4)] for row in range(6)
    ]
    batch = pack(
        GROUPS,
        scored,
        updates=2,
        microbatch_tokens=microbatch_tokens,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
    )
    batch.values = torch.zeros(batch.num_tokens, settings.num_heads)
    for place, identity in enumerate(batch.response_ids.tolist()):
        mask = batch.loss_mask & (batch.response_index == place)
        batch.values[mask] = _values(identity, int(mask.sum()))[:, : settings.num_heads]
    meter = Meter()
    raw = fill_targets(batch, batch.rewards, settings, seed, groups, meter)
    return batch, raw, reduce.whiten(raw, batch.loss_mask, groups.dp), reduce.reduce_meter(meter, groups).means()


def _by_response(batch: Batch, *tensors: Tensor) -> dict[int, list]:
    """response id -> each tensor's rows at its loss tokens."""
    return {
        identity: [tensor[batch.loss_mask & (batch.response_index == place)].tolist() for tensor in tensors]
        for place, identity in enumerate(batch.response_ids.tolist())
    }


def test_returns_and_metrics_by_hand():
    batch, raw, whitened, metrics = _filled(ParallelGroups.single(), 1000)
    everything, returns, values, spreads = [], [], [], []
    for identity, (advantages, targets) in _by_response(batch, raw, batch.returns).items():
        if identity in UNSCORED:
            assert advantages == []
            continue
        heads = _values(identity, len(advantages)).tolist()
        means = [statistics.fmean(row) for row in heads]
        later, after = 0.0, 0.0
        for t in reversed(range(len(means))):
            reward = _reward(identity) if t == len(means) - 1 else 0.0
            later = reward + 0.9 * after - means[t] + 0.9 * 0.8 * later
            after = means[t]
            assert advantages[t] == pytest.approx(later, abs=1e-5)
            assert targets[t] == pytest.approx(later + means[t], abs=1e-5)
        everything += advantages
        returns += targets
        values += means
        spreads += [statistics.pstdev(row) for row in heads]
    left = [r - v for r, v in zip(returns, values, strict=True)]
    explained = 1 - statistics.variance(left) / statistics.variance(returns)
    assert metrics["critic/explained_variance"] == pytest.approx(explained, abs=1e-5)
    assert metrics["critic/head_std"] == pytest.approx(statistics.fmean(spreads), abs=1e-5)
    assert metrics["critic/value_mean"] == pytest.approx(statistics.fmean(values), abs=1e-5)
    mean, std = statistics.fmean(everything), statistics.stdev(everything)
    expected = torch.tensor([(value - mean) / std for value in everything])
    assert torch.allclose(whitened[batch.loss_mask], expected, atol=1e-5)
    assert not raw[~batch.loss_mask].any() and not whitened[~batch.loss_mask].any()
    assert not batch.returns[~batch.loss_mask].any() and not batch.value_weights[~batch.loss_mask].any()


def test_equal_returns_leave_nothing_to_explain():
    """A return is reward less value plus value, so equal ones differ by rounding: a share of that says nothing."""
    batch, *_ = _filled(ParallelGroups.single(), 1000)
    meter, settings = Meter(), CriticConfig(num_heads=batch.values.shape[1])
    fill_targets(batch, -torch.ones_like(batch.rewards), settings, (0, 5), ParallelGroups.single(), meter)
    assert batch.returns[batch.loss_mask].unique().numel() > 1
    assert "critic/explained_variance" not in meter.means() and "critic/value_mean" in meter.means()


def test_a_token_pays_for_its_distance_from_the_reference():
    """Each token's reward is less its own estimate, so an undiscounted return less those of it and the later ones."""
    settings, kl = CriticConfig(num_heads=1), KlConfig(coefficient=0.3, estimator="k2", where="reward")
    batch, *_ = _filled(ParallelGroups.single(), 1000, settings)
    gap = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(1))
    batch.ref_log_probs = torch.where(batch.loss_mask, batch.rollout_log_probs - gap, torch.nan)
    meter = Meter()
    fill_targets(batch, batch.rewards, settings, (0, 5), ParallelGroups.single(), meter, kl)
    for identity, (returns, gaps) in _by_response(batch, batch.returns, gap).items():
        paid = [0.3 * value**2 / 2 for value in gaps]
        assert returns == pytest.approx([_reward(identity) - sum(paid[t:]) for t in range(len(paid))], abs=1e-5)
    assert meter.means()["policy/ref_kl"] == pytest.approx(float((gap[batch.loss_mask] ** 2 / 2).mean()), rel=1e-5)


def _everything(ranks: int, microbatch_tokens: int, share_of: str) -> tuple[dict, dict]:
    groups = ParallelGroups.from_grid(dp=ranks) if ranks > 1 else ParallelGroups.single()
    settings = CriticConfig(num_heads=3, share=0.4, share_of=share_of)
    batch, raw, whitened, metrics = _filled(groups, microbatch_tokens, settings)
    return _by_response(batch, raw, batch.returns, batch.value_weights, whitened), metrics


@pytest.mark.parametrize("share_of", ["responses", "tokens"])
def test_the_same_on_any_number_of_ranks_and_in_any_packing(share_of):
    wanted, metrics = _everything(1, 1000, share_of)
    for ranks, tokens in ((1, 30), (2, 30), (3, 1000)):
        case = (ranks, tokens, share_of)
        found = run_ranks(ranks, _everything, *case) if ranks > 1 else [_everything(*case)]
        together = {identity: rows for part, _ in found for identity, rows in part.items()}
        assert together.keys() == wanted.keys()
        for identity, (*exact, whitened) in wanted.items():
            assert together[identity][:-1] == exact  # advantages, returns and the heads' data to the last bit
            assert together[identity][-1] == pytest.approx(whitened, abs=1e-6)
        for _, other in found:
            assert other == pytest.approx(metrics, rel=1e-5)


def test_weights_of_an_update_add_up_to_one():
    batch, *_ = _filled(ParallelGroups.single(), 30)
    for update in batch.updates:
        parts = [batch.microbatch(*bounds).value_weights for bounds in update.microbatches]
        assert float(torch.cat(parts).sum()) == pytest.approx(1.0, abs=1e-5)
        assert torch.cat(parts).count_nonzero(dim=0).min() > 0


def test_each_update_of_each_step_and_run_draws_its_own():
    def drawn(*seed: int) -> list[list[list[bool]]]:
        """By update, of its eleven scored responses, the heads that learn from each."""
        batch, *_ = _filled(ParallelGroups.single(), 1000, seed=seed)
        heads = {
            identity: [weight > 0 for weight in rows[0]]
            for identity, (rows,) in _by_response(batch, batch.value_weights).items()
            if rows
        }
        return [[heads[identity] for identity in of if identity in heads] for of in (range(12), range(12, 24))]

    draws = [update for seed in ((0, 5), (0, 6), (1, 5)) for update in drawn(*seed)]
    assert [len(update) for update in draws] == [11] * 6
    assert len({str(update) for update in draws}) == 6


LENGTHS = torch.tensor([5, 0, 2, 7, 1, 1, 4, 3, 9])  # 8 with tokens, 32 tokens


@pytest.mark.parametrize(("share", "size"), [(1.0, 8), (0.5, 4), (0.125, 1), (0.3, 2), (0.2, 2), (0.05, 1)])
def test_each_head_draws_whole_responses_of_its_own(share, size):
    choice = head_choice(LENGTHS, 16, share, "responses", (0, 1, 0))
    assert choice.shape == (32, 16)
    drawn = torch.stack([rows.all(0) for rows in choice.split(LENGTHS[LENGTHS > 0].tolist())])
    some = torch.stack([rows.any(0) for rows in choice.split(LENGTHS[LENGTHS > 0].tolist())])
    assert drawn.equal(some) and drawn.sum(0).tolist() == [size] * 16
    assert (len({tuple(row) for row in drawn.T.tolist()}) > 1) == (share < 1)


def test_each_head_draws_tokens_of_its_own():
    choice = head_choice(LENGTHS, 4, 0.25, "tokens", (0, 1, 0))
    assert choice.sum(0).tolist() == [8] * 4 and len({tuple(row) for row in choice.T.tolist()}) == 4
    assert choice.equal(head_choice(LENGTHS, 6, 0.25, "tokens", (0, 1, 0))[:, :4])  # a head's data is its own


@pytest.mark.parametrize("seed", [(1, 1, 0), (0, 2, 0), (0, 1, 1)])
def test_data_are_drawn_anew_for_each_run_step_and_update(seed):
    first = head_choice(LENGTHS, 4, 0.5, "tokens", (0, 1, 0))
    assert first.equal(head_choice(LENGTHS, 4, 0.5, "tokens", (0, 1, 0)))
    assert not first.equal(head_choice(LENGTHS, 4, 0.5, "tokens", seed))


def test_nothing_to_learn_from():
    assert head_choice(torch.zeros(3, dtype=torch.int64), 2, 0.5, "responses", (0, 1, 0)).shape == (0, 2)
