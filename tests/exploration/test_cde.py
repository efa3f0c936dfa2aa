from __future__ import annotations

import logging
import math
import statistics

import pytest
import torch

from megatron_rlvr.advantages import group_relative
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.exploration.base import Needs, build
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Batch
from tests.exploration.toy import deal, make_batch
from tests.ranks import run_ranks

LENGTHS = [4, 1, 6, 3, 2]


def _batch(rewards: list[float], surprise: float = 2.0) -> Batch:
    """Old log-probs between 0 and -surprise on loss tokens; elsewhere a value that must not be read."""
    batch = make_batch(LENGTHS[: len(rewards)])
    values = -surprise * torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(5))
    batch.old_log_probs = torch.where(batch.loss_mask, values, 1e6)
    batch.rewards = torch.tensor(rewards)
    return batch


def _shape(options: dict, batch: Batch, step: int = 0) -> tuple[torch.Tensor, dict[str, float]]:
    meter = Meter()
    shaped = build({"cde": {"actor": options}}).shape_rewards(batch, ParallelGroups.single(), step, meter)
    return shaped, meter.means()


def _surprise(batch: Batch) -> list[float]:
    rows = zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True)
    values = [batch.old_log_probs[low:high][batch.loss_mask[low:high]].tolist() for low, high in rows]
    return [-math.fsum(row) / len(row) for row in values]


@pytest.mark.parametrize("options", [{}, {"kappa": 2.0, "alpha": 0.3, "omega_0": 0.5}, {"alpha": 0.0}])
def test_the_bonus_by_hand(options):
    batch = _batch([1.0, -1.0, -0.5, 0.0, 1.0], surprise=1.0)
    kappa, alpha, omega = options.get("kappa", 3.0), options.get("alpha", 1.0), options.get("omega_0", 1.0)
    pairs = zip(batch.rewards.tolist(), _surprise(batch), strict=True)
    bonus = [omega * min(abs(r) / kappa, alpha * b) for r, b in pairs]
    shaped, metrics = _shape(options, batch)
    assert torch.allclose(shaped, batch.rewards + torch.tensor(bonus))
    assert metrics["cde/bonus"] == pytest.approx(sum(bonus) / 5)
    assert metrics["cde/omega"] == omega
    assert shaped[3] == 0  # no reward, no bonus


def test_the_rollouts_log_probs_serve_where_the_old_policy_has_no_pass():
    with_pass, without = _batch([1.0, -1.0]), _batch([1.0, -1.0])
    without.rollout_log_probs, without.old_log_probs = with_pass.old_log_probs, None
    assert torch.equal(_shape({}, without)[0], _shape({}, with_pass)[0])


@pytest.mark.parametrize("surprise", [0.0, 0.1, 50.0])
def test_the_cap_keeps_the_sign_of_the_reward(surprise):
    batch = _batch([1.0, -1.0, -0.01, 0.0, 0.2])
    batch.old_log_probs = torch.full((batch.num_tokens,), -surprise)
    shaped, metrics = _shape({"omega_0": 2.9}, batch)
    assert torch.equal(shaped.sign(), batch.rewards.sign())
    assert ((shaped - batch.rewards) <= 2.9 * batch.rewards.abs() / 3 + 1e-6).all()
    assert not any(math.isnan(value) for value in metrics.values())


def _in_groups(rewards: list[float], size: int = 2) -> Batch:
    batch = make_batch([3] * len(rewards))
    batch.group_size, batch.rewards = size, torch.tensor(rewards)
    batch.old_log_probs = -0.05 * (1 + batch.response_index)
    return batch


@pytest.mark.parametrize("keeps", [True, False])
def test_groups_that_are_all_right_or_all_wrong(keeps):
    """GRPO makes advantages of order 1 of what is left there, the bonus; by option such groups get none."""
    batch = _in_groups([1.0, 1.0, -1.0, 1.0, -1.0, -1.0])
    shaped, _ = _shape({"bonus_in_degenerate_groups": keeps}, batch)
    gets = torch.tensor([keeps, keeps, True, True, keeps, keeps])
    assert (shaped != batch.rewards).equal(gets)
    advantages = group_relative(shaped.view(3, 2), torch.ones(3, 2, dtype=torch.bool))
    assert advantages[[0, 2]].abs().allclose(torch.full((2, 2), 0.5**0.5 if keeps else 0.0), atol=1e-4)


def test_a_response_that_nobody_could_judge_does_not_make_its_group_differ():
    batch = _in_groups([1.0, 0.0, -1.0, 1.0, -1.0, 0.0])
    batch.response_lengths[[1, 5]] = 0
    shaped, _ = _shape({"bonus_in_degenerate_groups": False}, batch)
    assert (shaped != batch.rewards).tolist() == [False, False, True, True, False, False]


def test_a_groups_rewards_are_looked_at_on_every_rank():
    whole = _in_groups([1.0, 1.0, -1.0, 1.0, -1.0, -1.0])
    wanted, _ = _shape({"bonus_in_degenerate_groups": False}, whole)

    def work():
        groups = ParallelGroups.from_grid(dp=2)
        batch, _ = deal(whole, [[[0, 3, 5]], [[4, 1, 2]]][groups.dp_rank])
        method = build({"cde": {"actor": {"bonus_in_degenerate_groups": False}}})
        return batch.response_ids.tolist(), method.shape_rewards(batch, groups, 0, Meter()).tolist()

    for places, found in run_ranks(2, work, timeout=60):
        assert found == pytest.approx(wanted[places].tolist())


def test_a_confident_error_loses_more_than_a_doubtful_one():
    batch = _batch([-1.0, -1.0])
    batch.old_log_probs = torch.where(batch.response_index == 0, -0.01, -0.2)
    shaped, _ = _shape({}, batch)
    assert shaped[0] < shaped[1] < 0


def test_a_response_without_tokens_gets_no_bonus():
    batch = make_batch([3, 0])
    batch.old_log_probs, batch.rewards = torch.full((batch.num_tokens,), -0.1), torch.tensor([1.0, -1.0])
    shaped, _ = _shape({}, batch)
    assert torch.allclose(shaped, torch.tensor([1.1, -1.0]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "none"}, [1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear", "total_steps": 100}, [1.0, 0.75, 0.5, 0.0, 0.0]),
        ({"schedule": "cosine", "total_steps": 100}, [1.0, (1 + 0.5**0.5) / 2, 0.5, 0.0, 0.0]),
        ({"schedule": "staircase", "milestones": [[25, 0.5], [100, 0]]}, [1.0, 0.5, 0.5, 0.0, 0.0]),
    ],
)
def test_schedules(options, expected):
    batch = _batch([1.0, -1.0])
    plain = _shape({}, batch)[0] - batch.rewards
    for step, multiplier in zip([0, 25, 50, 100, 1000], expected, strict=True):
        shaped, metrics = _shape({"omega_0": 0.8, **options}, batch, step)
        assert metrics["cde/omega"] == pytest.approx(0.8 * multiplier, abs=1e-12)
        assert torch.allclose(shaped - batch.rewards, 0.8 * multiplier * plain, atol=1e-6)


def test_responses_without_a_verdict_have_no_part_in_the_metrics(caplog):
    judged, all_of_them = _batch([1.0, -1.0]), _batch([1.0, -1.0, 0.0])
    all_of_them.loss_mask &= all_of_them.response_index != 2
    all_of_them.response_lengths[2] = 0
    with caplog.at_level(logging.WARNING):
        bonus = _shape({}, all_of_them)[1]["cde/bonus"]
    assert bonus == pytest.approx(_shape({}, judged)[1]["cde/bonus"], rel=1e-6)
    right = _batch([1.0, 1.0, 0.0])  # two are right and one has no verdict: nothing is wrong, and nothing to warn of
    right.response_lengths[2] = 0
    _shape({}, right)
    assert not caplog.records


@pytest.mark.parametrize(("rewards", "warnings"), [([1.0, 0.0], 1), ([1.0, 1.0], 0), ([1.0, -1.0], 0), ([0.5, 0.0], 0)])
def test_warns_once_that_zero_rewards_get_no_bonus(rewards, warnings, caplog):
    method, batch = build({"cde": {}}), _batch(rewards)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            method.shape_rewards(batch, ParallelGroups.single(), step, Meter())
    assert sum("reward.scale=signed" in record.message for record in caplog.records) == warnings


CRITIC_LENGTHS = [3, 1, 2]


def _critic_batch(heads: int = 4) -> Batch:
    """Values and advantages on loss tokens; elsewhere 0, as the critic leaves them."""
    batch = make_batch(CRITIC_LENGTHS)
    values = torch.randn(batch.num_tokens, heads, generator=torch.Generator().manual_seed(2))
    batch.values = torch.where(batch.loss_mask[:, None], values, 0.0)
    batch.advantages = torch.where(batch.loss_mask, values.sum(1), 0.0)
    batch.rewards = torch.tensor([1.0, -1.0, 0.5])
    return batch


def _spread_after(batch: Batch) -> list[float]:
    """Per loss token the population's deviation over the heads at the response's next one, 0 behind the last."""
    found = []
    for length, rows in zip(CRITIC_LENGTHS, batch.values[batch.loss_mask].split(CRITIC_LENGTHS), strict=True):
        spreads = [statistics.pstdev(row) for row in rows.tolist()]
        found += [*spreads, 0.0][1 : length + 1]
    return found


@pytest.mark.parametrize("options", [{}, {"kappa": 2.0, "alpha": 0.1, "omega_0": 0.7}, {"alpha": 0.0}])
@pytest.mark.parametrize("order", ["after_whitening", "before_whitening"])
def test_the_critic_bonus_by_hand(options, order):
    batch, meter = _critic_batch(), Meter()
    method = build({"cde": {"actor": None, "critic": options | {"order": order}}})
    assert method.needs() == Needs(value_heads=2)
    kappa, alpha, omega = options.get("kappa", 3.0), options.get("alpha", 0.5), options.get("omega_0", 1.0)
    pairs = zip(batch.advantages[batch.loss_mask].tolist(), _spread_after(batch), strict=True)
    bonus = torch.tensor([omega * min(abs(a) / kappa, alpha * b) for a, b in pairs])
    hooks = [method.shape_raw_advantages, method.shape_advantages]
    for hook, acts in zip(hooks, [order == "before_whitening", order == "after_whitening"], strict=True):
        shaped = hook(batch, ParallelGroups.single(), 0, meter)
        assert torch.allclose((shaped - batch.advantages)[batch.loss_mask], bonus * acts, atol=1e-6)
        assert not shaped[~batch.loss_mask].any()
        assert (shaped.sign() == batch.advantages.sign()).all()  # the cap keeps the sign
    assert meter.means()["cde/critic_bonus"] == pytest.approx(float(bonus.mean()), abs=1e-6)
    assert torch.equal(method.shape_rewards(batch, ParallelGroups.single(), 0, meter), batch.rewards)


def test_one_head_never_disagrees():
    batch = _critic_batch(heads=1)
    method = build({"cde": {"actor": None, "critic": {}}})
    assert torch.equal(method.shape_advantages(batch, ParallelGroups.single(), 0, Meter()), batch.advantages)


def test_both_bonuses_together_are_each_what_they_are_alone():
    batch, groups = _critic_batch(), ParallelGroups.single()
    batch.old_log_probs = torch.full((batch.num_tokens,), -0.2)
    both, actor, critic = (build({"cde": part}) for part in ({"critic": {}}, {}, {"actor": None, "critic": {}}))
    assert both.needs() == Needs(value_heads=2)
    assert torch.equal(both.shape_rewards(batch, groups, 0, Meter()), actor.shape_rewards(batch, groups, 0, Meter()))
    assert not torch.equal(both.shape_rewards(batch, groups, 0, Meter()), batch.rewards)
    found, wanted = (method.shape_advantages(batch, groups, 0, Meter()) for method in (both, critic))
    assert torch.equal(found, wanted) and not torch.equal(found, batch.advantages)
