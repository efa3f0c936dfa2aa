"""The edges of the baselines' methods: where they do nothing, what they refuse, what they remember and report.

Their values and gradients are in test_against_oracle.py.
"""

from __future__ import annotations

import pytest
import torch

from megatron_rlvr.config import AlgorithmConfig, Config, ConfigError, RolloutConfig, TrainerConfig
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.exploration.base import build
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Prompt, Rollout, RolloutGroup
from megatron_rlvr.verdict import Verdict
from tests.exploration.toy import fill_old, make_batch, make_logits, statistics, update_loss

LENGTHS = [9, 4, 12, 7]
OFF_POLICY = Config(trainer=TrainerConfig(updates_per_rollout=2))
SELECTING = ["kl_cov", "clip_cov", "high_entropy", "stapo"]


@pytest.mark.parametrize("name", [*SELECTING, "rollout_correction"])
@pytest.mark.parametrize("case", ["no loss token", "equal advantages", "one token"])
def test_degenerate_updates_stay_finite(name, case):
    batch, method = make_batch([1] if case == "one token" else LENGTHS), build({name: {}}, OFF_POLICY)
    if case == "no loss token":
        batch.loss_mask = torch.zeros_like(batch.loss_mask)
    if case == "equal advantages":
        batch.advantages = torch.zeros(batch.num_tokens)
    logits = make_logits(batch)
    fill_old(batch, logits, method)
    loss, gradient, metrics = update_loss(batch, logits, method, "unclipped", (0.2, 0.2))
    assert loss.isfinite() and gradient.isfinite().all()
    assert not any(value != value for value in metrics.values())
    if case != "one token":
        assert not gradient.any()
    if name.endswith("_cov"):  # there is no covariance
        assert not metrics.get(f"{name}/share")


def test_kl_cov_does_nothing_where_the_policy_has_not_moved():
    batch = make_batch(LENGTHS)
    logits, results = make_logits(batch), []
    for settings in ({}, {"kl_cov": {"share": 0.5, "coefficient": 100.0}}):
        method = build(settings, OFF_POLICY)
        fill_old(batch, logits, method)
        results.append(update_loss(batch, logits, method, "unclipped", (0.2, 0.2)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[1][2]["kl_cov/share"] == pytest.approx(16 / 32) and results[1][2]["kl_cov/moved"] == 0
    with pytest.raises(ConfigError, match="kl_cov does nothing in the first update.*updates_per_rollout=1"):
        build({"kl_cov": {}}, Config())


@pytest.mark.parametrize(("share", "count"), [(0.002, 1), (0.0625, 2), (0.09, 2)])
@pytest.mark.parametrize(
    ("name", "options", "metric"),
    [
        ("kl_cov", {}, "share"),
        ("kl_cov", {"scope": "microbatch"}, "share"),
        ("clip_cov", {"low": 0.0, "high": 50.0}, "share"),
        ("high_entropy", {}, "left_out"),
    ],
)
def test_a_share_of_tokens_is_rounded_down_to_one_at_least(name, options, metric, share, count):
    batch, method = make_batch(LENGTHS), build({name: options | {"share": share}}, OFF_POLICY)
    logits = make_logits(batch)
    fill_old(batch, logits, method)
    _, _, metrics = update_loss(batch, logits, method, "unclipped", (0.2, 0.2))
    wanted = 32 - count if metric == "left_out" else count
    assert metrics[f"{name}/{metric}"] * 32 == pytest.approx(wanted)


def test_clip_cov_draws_anew_each_update_and_goes_on_after_a_restart():
    batch, options = make_batch(LENGTHS), {"clip_cov": {"share": 0.1, "low": 0.0, "high": 50.0}}
    method, draws = build(options), []
    fill_old(batch, make_logits(batch), method)
    for update in range(3):
        if update == 2:
            state, method = method.state_dict(), build(options)
            method.load_state_dict(state)
        method.prepare_update(batch, batch.updates[0], ParallelGroups.single())
        draws.append(batch.extras["clip_cov/left_out"].clone())
        assert int(draws[-1].sum()) == 3
    assert not torch.equal(draws[0], draws[1])
    whole, third = build(options), None
    for _ in range(3):
        whole.prepare_update(batch, batch.updates[0], ParallelGroups.single())
        third = batch.extras["clip_cov/left_out"]
    assert torch.equal(third, draws[2])
    below_zero = build(options, Config(seed=-1))
    below_zero.prepare_update(batch, batch.updates[0], ParallelGroups.single())
    assert int(batch.extras["clip_cov/left_out"].sum()) == 3


def test_each_update_keeps_its_own_selection():
    """Two updates over two halves of a batch: the share holds in each of them."""
    batch, method = make_batch([20, 20]), build({"high_entropy": {}})
    fill_old(batch, make_logits(batch, scale=2.0), method)
    (update,) = batch.updates
    halves = [type(update)(((place, place + 1),), 20, 1) for place in (0, 1)]
    for half in halves:
        method.prepare_update(batch, half, ParallelGroups.single())
    for half in halves:
        weights = batch.of_update(half).extras["high_entropy/weight"]
        assert sorted(weights.tolist()) == [0.0] * 18 + [5.0] * 4


def test_overlong_punishes_the_end_of_the_range():
    run = Config(rollout=RolloutConfig(max_response_length=20))
    method, batch, meter = (
        build({"overlong": {"buffer": 8, "factor": 0.5}}, run),
        make_batch([1, 12, 13, 16, 20, 0]),  # no verifier judged the last
        Meter(),
    )
    batch.rewards = torch.ones(6)
    shaped = method.shape_rewards(batch, ParallelGroups.single(), 0, meter)
    assert shaped.tolist() == pytest.approx([1.0, 1.0, 1 - 0.5 / 8, 0.75, 0.5, 1.0])
    assert meter.means() == {"overlong/penalty": pytest.approx(-0.8125 / 5), "overlong/share": pytest.approx(3 / 5)}
    with pytest.raises(ConfigError, match="overlong.buffer=20 must be below rollout.max_response_length=20"):
        build({"overlong": {"buffer": 20}}, run)


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        ([1.0, 0.0], True),
        ([1.0, 1.0], False),
        ([0.0], True),
        ([1.0, 0.5, 1.0], True),
        ([1.0, None], False),
        ([None] * 2, False),
    ],
)
def test_dynamic_sampling_keeps_groups_that_differ(rewards, kept):
    rollouts = [
        Rollout(
            place, [1], [0.0], "stop", 0, verdict=Verdict(0.0, "error") if reward is None else Verdict(reward, "ok")
        )
        for place, reward in enumerate(rewards)
    ]
    assert build({"dynamic_sampling": {}}).keep_group(RolloutGroup(Prompt("0", "", (1,), "math", 0), rollouts)) == kept


def test_rollout_correction_reports_what_it_drops():
    batch, method, meter = make_batch([4]), build({"rollout_correction": {"form": "icepop"}}), Meter()
    fill_old(batch, make_logits(batch), method)
    batch.rollout_log_probs = batch.old_log_probs.float() - torch.tensor([0.0, 0.4, 0.6, 5.1, 1.0, 0.0]).log()
    batch.rollout_log_probs[0] = torch.nan  # no loss token
    current = statistics(make_logits(batch), batch, method)
    losses = method.policy_loss(torch.ones(6), batch.microbatch(0, 1), current, meter)
    assert losses[1:5].tolist() == pytest.approx([0.0, 0.6, 0.0, 1.0], rel=1e-5)
    assert meter.means() == pytest.approx(
        {"rollout_correction/weight": 0.4, "rollout_correction/dropped": 0.5}, rel=1e-5
    )


@pytest.mark.parametrize("form", ["tis", "sequence_tis"])
def test_a_truncated_correction_keeps_to_both_of_its_bounds(form):
    batch, method = make_batch([1, 1, 1]), build({"rollout_correction": {"form": form, "low": 0.5, "high": 1.5}})
    fill_old(batch, make_logits(batch), method)
    weights = torch.tensor([0.1, 1.2, 9.0])
    batch.rollout_log_probs = batch.old_log_probs.float() - weights.log().repeat_interleave(3)
    current = statistics(make_logits(batch), batch, method)
    losses = method.policy_loss(torch.ones(9), batch.microbatch(0, 3), current, Meter())
    assert losses[batch.loss_mask].tolist() == pytest.approx([0.5, 1.2, 1.5], rel=1e-5)


def test_stapo_leaves_out_rewarded_tokens_alone():
    """Improbable and certain ones all of them; an advantage of 0 is no reward."""
    batch, method = make_batch([1, 1, 1, 1]), build({"stapo": {"quantile": 0.9}})
    batch.old_log_probs, batch.entropy = torch.full((12,), -20.0), torch.full((12,), 0.1)
    batch.advantages = torch.tensor([1.0, 0.0, -1.0, 0.0]).repeat_interleave(3)
    batch.entropy[-3:] = 5.0  # the one that is not certain
    (update,) = batch.updates
    method.prepare_update(batch, update, ParallelGroups.single())
    weights = batch.of_update(update).extras["stapo/weight"]
    assert weights[batch.loss_mask].tolist() == pytest.approx([0.0, 4 / 3, 4 / 3, 4 / 3])


def test_who_needs_the_old_policys_statistics_before_the_loss():
    for name, options, needs in [
        *((name, {}, True) for name in SELECTING),
        *((name, {"scope": "microbatch"}, False) for name in SELECTING[:3]),
        ("lp_reg", {"preset": "released_code", "proxy_source": "current"}, False),
        ("lp_reg", {"target_share": 0.1}, True),
        ("cde", {}, False),
        ("rollout_correction", {}, False),
        ("rollout_correction", {"form": "mis", "renormalise": True}, True),
        ("entropy_bonus", {}, False),
        ("overlong", {"buffer": 1}, False),
        ("dynamic_sampling", {}, False),
    ]:
        assert build({name: options}, OFF_POLICY).needs().old_statistics == needs, (name, options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_cov": {}, "clip_cov": {}}, "clip_cov and kl_cov cannot run together.*covariance"),
        (
            {"stapo": {}, "rollout_correction": {"form": "mis", "renormalise": True}},
            "rollout_correction and stapo cannot run together.*number of tokens|stapo and rollout_correction cannot",
        ),
        ({"stapo": {}, "high_entropy": {}}, "high_entropy and stapo cannot run together.*number of tokens"),
        ({"kl_cov": {"share": 0}}, r"kl_cov.share must be in \(0, 1\]"),
        ({"kl_cov": {"coefficient": -1}}, "kl_cov.coefficient must be at least 0"),
        ({"clip_cov": {"share": 2}}, r"clip_cov.share must be in \(0, 1\]"),
        ({"clip_cov": {"low": 9}}, "clip_cov.low=9.0 must be below"),
        ({"high_entropy": {"share": 20}}, r"high_entropy.share must be in \(0, 1\]"),
        ({"stapo": {"tau": 0}}, r"stapo.tau must be in \(0, 1\)"),
        ({"stapo": {"quantile": 75}}, r"stapo.quantile must be in \(0, 1\)"),
        ({"overlong": {"buffer": 0}}, "overlong.buffer must be at least 1"),
        ({"overlong": {"factor": -1}}, "overlong.factor must be at least 0"),
        ({"rollout_correction": {"high": 0.5}}, "must hold 1 between them"),
        ({"rollout_correction": {"renormalise": True}}, "renormalise has no effect with form=tis"),
        ({"rollout_correction": {"form": "iecpop"}}, "rollout_correction.form must be one of 'tis'"),
        ({"lp_reg": {"target_share": 1.0}}, r"target_share must be in \[0, 1\)"),
        ({"lp_reg": {"target_share": 0.1, "proxy_source": "current"}}, "set exploration.lp_reg.proxy_source=old"),
        (
            {"lp_reg": {"beta": "advantages"}},
            "lp_reg.beta must be of type float.*or exploration.lp_reg.beta must be one of",
        ),
        ({"lp_reg": {"protection": -1}}, "protection must be at least 0"),
        ({"lp_reg": {"protection": 0.5}}, "protection=0.5 is read with exploration.lp_reg.beta=advantage alone"),
    ],
)
def test_bad_options_say_why(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(settings, OFF_POLICY)


@pytest.mark.parametrize("loss", ["cispo", "dppo_tv", "dppo_kl", "gspo"])
def test_clip_cov_in_microbatches_is_refused_where_no_tokens_loss_shows_that_it_is_not_clipped(loss):
    run = Config(algorithm=AlgorithmConfig(loss=loss))
    build({"clip_cov": {}, "rollout_correction": {"form": "mis"}, "stapo": {}}, run)
    with pytest.raises(ConfigError, match=f"tokens whose loss is still -A r, which is no token's with.*={loss}: set"):
        build({"clip_cov": {"scope": "microbatch"}}, run)
