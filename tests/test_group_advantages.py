"""Advantages of a step against the same sums over plain Python lists, on one rank and on two."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from megatron_rlvr.config import AlgorithmConfig, KlConfig
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.group_advantages import group_advantages
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Batch
from tests.exploration.toy import deal, make_batch
from tests.ranks import run_ranks

LENGTHS = [3, 5, 1, 4, 2, 6]  # two groups of three
REWARDS = [1.0, 0.0, 0.5, -1.0, 1.0, 0.0]
UNSCORED = 4  # so that its tokens are in no loss
COEFFICIENT = 0.2
NAMES = ["grpo", "grpo_no_std", "rloo", "reinforce"]
CASES = [(name, whiten, where) for name in NAMES for whiten in (False, True) for where in ("", "reward", "loss")]


def make_step() -> Batch:
    batch = make_batch(LENGTHS)
    generator = torch.Generator().manual_seed(1)
    batch.old_log_probs, batch.ref_log_probs = -3 * torch.rand(2, batch.num_tokens, generator=generator)
    batch.loss_mask &= batch.response_index != UNSCORED
    batch.rewards, batch.group_size = torch.tensor(REWARDS), 3
    batch.response_lengths = batch.per_response_sum(torch.ones(batch.num_tokens)).long()
    return batch


def expected(name: str, whiten: bool, where: str) -> list[float]:
    """The advantages of all loss tokens, response by response."""
    batch = make_step()
    kl = (batch.old_log_probs - batch.ref_log_probs).double()
    of_response = [(kl[batch.loss_mask & (batch.response_index == i)] * COEFFICIENT).tolist() for i in range(6)]
    if where != "reward":
        of_response = [[0.0] * len(row) for row in of_response]
    rewards = [reward - math.fsum(row) for reward, row in zip(REWARDS, of_response, strict=True)]
    tokens = []
    for i, row in enumerate(of_response):
        others = [j for j in range(i // 3 * 3, i // 3 * 3 + 3) if j != UNSCORED]
        values = [rewards[j] for j in others]
        for place in range(len(row)):
            if name == "reinforce":
                tokens.append(REWARDS[i] - math.fsum(row[place:]))
            elif name == "rloo":
                tokens.append(rewards[i] - statistics.fmean(rewards[j] for j in others if j != i))
            else:
                std = statistics.stdev(values) + 1e-6 if name == "grpo" else 1.0
                tokens.append((rewards[i] - statistics.fmean(values)) / std)
    if whiten:
        mean, std = statistics.fmean(tokens), statistics.stdev(tokens)
        tokens = [(value - mean) / std for value in tokens]
    return tokens


def found(microbatches: list[list[int]], groups: ParallelGroups) -> list[dict[int, list[float]]]:
    """For each case, response -> advantages of its loss tokens."""
    results = []
    scored = torch.tensor([[True, True, True], [True, False, True]])
    for name, whiten, where in CASES:
        batch, _ = deal(make_step(), microbatches)
        kl = KlConfig(COEFFICIENT if where else 0.0, "k1", where or "loss")
        algorithm = AlgorithmConfig(advantage=name, whiten=whiten, kl=kl)
        advantages = group_advantages(batch, batch.rewards, scored, algorithm, groups, Meter())
        rows = [batch.loss_mask & (batch.response_index == place) for place in range(batch.num_responses)]
        ids = batch.response_ids.tolist()
        results.append({i: advantages[row].tolist() for i, row in zip(ids, rows, strict=True)})
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_advantages_of_a_step(ranks):
    shares = {1: [[[0, 1, 2, 3, 4, 5]]], 2: [[[5], [0, 3]], [[2, 4], [1]]]}[ranks]

    def work():
        groups = ParallelGroups.from_grid(dp=2)
        return found(shares[groups.dp_rank], groups)

    parts = run_ranks(2, work) if ranks == 2 else [found(shares[0], ParallelGroups.single())]
    for place, case in enumerate(CASES):
        merged = {i: values for part in parts for i, values in part[place].items()}
        tokens = [value for i in range(6) for value in merged[i]]
        assert tokens == pytest.approx(expected(*case), abs=2e-6), case


def test_without_a_coefficient_the_reference_is_not_asked():
    batch, meter = make_batch(LENGTHS), Meter()
    batch.rewards = torch.tensor(REWARDS)
    scored = torch.ones(2, 3, dtype=torch.bool)
    group_advantages(batch, batch.rewards, scored, AlgorithmConfig(), ParallelGroups.single(), meter)
    assert not batch.has("ref_log_probs") and meter.means() == {}
