from __future__ import annotations

import statistics

import pytest
import torch

from megatron_rlvr.advantages import ESTIMATORS, gae, group_relative


def _scored(rewards: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(rewards, dtype=torch.bool)


@pytest.mark.parametrize(
    ("correct", "right", "wrong"),
    [
        (1, 2.475, -0.354),
        (2, 1.620, -0.540),
        (3, 1.208, -0.725),
        (4, 0.935, -0.935),
        (5, 0.725, -1.208),
        (6, 0.540, -1.620),
        (7, 0.354, -2.475),
    ],
)
def test_eight_binary_rewards(correct, right, wrong):
    rewards = torch.tensor([[1.0] * correct + [0.0] * (8 - correct)])
    advantages = group_relative(rewards, _scored(rewards))
    assert torch.allclose(advantages[0, :correct], torch.tensor(right), atol=1e-3)
    assert torch.allclose(advantages[0, correct:], torch.tensor(wrong), atol=1e-3)


def test_against_the_statistics_module_with_unscored_responses():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(5, 6, generator=generator)
    scored = torch.rand(5, 6, generator=generator) > 0.3
    scored[0], scored[1], scored[2] = True, False, False
    scored[2, 4] = True  # one left: nothing to compare it with
    with_std, without = group_relative(rewards, scored, True), group_relative(rewards, scored, False)
    for row in range(5):
        values = [float(value) for value, ok in zip(rewards[row], scored[row], strict=True) if ok]
        mean = statistics.fmean(values) if len(values) > 1 else 0.0
        std = statistics.stdev(values) if len(values) > 1 else 1.0
        for column in range(6):
            centred = float(rewards[row, column]) - mean if scored[row, column] else 0.0
            assert float(without[row, column]) == pytest.approx(centred, abs=1e-6)
            assert float(with_std[row, column]) == pytest.approx(centred / (std + 1e-6), abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -1.0, 1 / 3])
def test_a_group_of_equal_rewards_teaches_nothing(value):
    rewards = torch.full((1, 7), value)
    assert group_relative(rewards, _scored(rewards)).abs().max() < 1e-9


def test_a_verifier_failure_does_not_move_its_siblings():
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    scored = torch.tensor([[True, True, True, False]])
    alone = group_relative(rewards[:, :3], scored[:, :3])
    for unscored_value in (0.0, -7.0, float("nan")):
        rewards[0, 3] = unscored_value
        assert torch.equal(group_relative(rewards, scored)[:, :3], alone)
        assert group_relative(rewards, scored)[0, 3] == 0


def test_leave_one_out_compares_with_the_others():
    rewards = torch.tensor([[1.0, 0.0, 0.5, 9.0], [2.0, 9.0, 9.0, 9.0], [9.0] * 4])
    scored = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    expected = [[1 - 0.25, 0 - 0.75, 0.5 - 0.5, 0.0], [2.0, 0.0, 0.0, 0.0], [0.0] * 4]
    assert torch.allclose(ESTIMATORS["rloo"](rewards, scored), torch.tensor(expected))


def test_reinforce_has_no_baseline():
    rewards = torch.tensor([[1.0, -2.0, float("nan")]])
    scored = torch.tensor([[True, True, False]])
    assert torch.equal(ESTIMATORS["reinforce"](rewards, scored), torch.tensor([[1.0, -2.0, 0.0]]))


def test_estimators_by_name():
    rewards = torch.tensor([[2.0, 0.0]])
    assert torch.allclose(ESTIMATORS["grpo"](rewards, _scored(rewards)), torch.tensor([[0.5**0.5, -(0.5**0.5)]]))
    assert torch.equal(ESTIMATORS["grpo_no_std"](rewards, _scored(rewards)), torch.tensor([[1.0, -1.0]]))


def _gae_loop(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """One response, from the definition: every delta summed on its own."""
    after = [*values, 0.0][1:]
    deltas = [reward + gamma * later - value for reward, later, value in zip(rewards, after, values, strict=True)]
    return [
        sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, len(deltas))) for t in range(len(deltas))
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.95), (1.0, 0.0), (0.0, 1.0)])
def test_gae_against_a_loop_over_responses_of_any_length(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    lengths = [4, 1, 0, 9, 2]
    rewards, values = torch.randn(2, sum(lengths), generator=generator)
    found = gae(rewards, values, torch.tensor(lengths), gamma, lam)
    expected = [
        advantage
        for r, v in zip(rewards.split(lengths), values.split(lengths), strict=True)
        for advantage in _gae_loop(r.tolist(), v.tolist(), gamma, lam)
    ]
    assert found.dtype == values.dtype
    assert torch.allclose(found, torch.tensor(expected), atol=1e-6)


def test_without_discounts_the_return_is_the_reward():
    values = torch.tensor([0.3, -0.2, 0.9, 0.5, 0.1])
    rewards = torch.tensor([0.0, 0.0, 1.0, 0.0, -1.0])
    advantages = gae(rewards, values, torch.tensor([3, 2]), gamma=1.0, lam=1.0)
    assert torch.allclose(advantages + values, torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0]))
