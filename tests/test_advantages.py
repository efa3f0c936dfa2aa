from __future__ import annotations

import statistics

import pytest
import torch

from megatron_rlvr.advantages import ESTIMATORS, group_relative


def _scored(rewards: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(rewards, dtype=torch.bool)


@pytest.mark.parametrize(
    ("correct", "right", "wrong"),
    [(1, 2.475, -0.354), (2, 1.620, -0.540), (3, 1.208, -0.725), (4, 0.935, -0.935), (7, 0.354, -2.475)],
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


def test_estimators_by_name():
    rewards = torch.tensor([[2.0, 0.0]])
    assert torch.allclose(ESTIMATORS["grpo"](rewards, _scored(rewards)), torch.tensor([[0.5**0.5, -(0.5**0.5)]]))
    assert torch.equal(ESTIMATORS["grpo_no_std"](rewards, _scored(rewards)), torch.tensor([[1.0, -1.0]]))
