"""Rules between the keys of ``algorithm``: each refusal names the key, the rule and the way out."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_rlvr.config import AlgorithmConfig, Config, ConfigError, DataConfig, ModelConfig, check, from_dict
from megatron_rlvr.group_advantages import ESTIMATORS
from megatron_rlvr.losses import KL_ESTIMATORS, LOSSES, REDUCTIONS

GOOD = Config(verifier="math", model=ModelConfig(path="model"), data=DataConfig(path="data", max_prompt_length=64))


def algorithm(**options) -> AlgorithmConfig:
    return from_dict(AlgorithmConfig, options, "algorithm")


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "reduction": "sequence_mean"},
        {"loss": "cispo", "clip_low": 1.0},
        {"advantage": "grpo_no_std", "reduction": "sequence_sum"},
        {"advantage": "reinforce", "whiten": True, "kl": {"coefficient": 0.01, "estimator": "k1", "where": "reward"}},
    ],
)
def test_baselines_that_are_only_settings(options):
    check(dataclasses.replace(GOOD, algorithm=algorithm(**options)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "gspo"}, "loss=gspo needs algorithm.reduction=sequence_mean, not token_mean"),
        (
            {"loss": "plain_clip", "dual_clip": 3},
            "dual_clip is a part of algorithm.loss=ppo.*no effect with plain_clip",
        ),
        ({"loss": "cispo", "dual_clip": 3}, "no effect with cispo"),
        ({"loss": "cispo", "clip_low": 10}, r"clip_low must be in \[0, 1\]"),
        ({"kl": {"coefficient": -1}}, "algorithm.kl.coefficient must be at least 0, not -1"),
        ({"kl": {"estimator": "k4"}}, "algorithm.kl.estimator must be one of 'k1', 'k2', 'k3'"),
        ({"kl": {"coeficient": 1}}, "unknown key 'algorithm.kl.coeficient'; did you mean 'algorithm.kl.coefficient'"),
        ({"advantage": "reinforce++"}, "algorithm.advantage must be one of"),
    ],
)
def test_bad_settings_say_why(options, message):
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(GOOD, algorithm=algorithm(**options)))


def test_every_name_has_its_function():
    # gae is no estimator of rewards alone: the critic's targets are value_targets.py's
    hints = {"loss": LOSSES, "advantage": [*ESTIMATORS, "gae"], "reduction": REDUCTIONS}
    for key, table in hints.items():
        for name in table:
            assert getattr(algorithm(**{key: name}), key) == name
        with pytest.raises(ConfigError) as refusal:
            algorithm(**{key: "other"})
        assert all(repr(name) in str(refusal.value) for name in table)
        assert str(refusal.value).count("'") == 2 * (len(table) + 1)  # no name in the config without a function
    assert all(algorithm(kl={"estimator": name}).kl.estimator == name for name in KL_ESTIMATORS)
