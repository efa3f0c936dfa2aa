"""What is refused before any rank starts, although each part of it is right by itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_rlvr import preflight, train
from megatron_rlvr.config import Config, ConfigError, from_dict
from tests.integration.test_real_data import save_byte_tokenizer
from tests.tiny import make_folder

CDE = {"cde": {"critic": {}}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_byte_tokenizer(make_folder(root / "policy"))
    make_folder(root / "small", num_hidden_layers=2)
    make_folder(root / "other", vocab_size=97)
    (root / "data.jsonl").write_text('{"prompt": "1,2,3=6>", "answer": {"numbers": [1, 2, 3], "target": 6}}\n')
    return root


def _config(models: Path, advantage: str, critic: dict, exploration: dict, **more: dict) -> Config:
    sections = {
        "verifier": "countdown",
        "model": {"path": str(models / "policy")},
        "data": {"path": str(models / "data.jsonl"), "max_prompt_length": 16, "template": "raw"},
        "rollout": {"max_response_length": 7},
        "algorithm": {"advantage": advantage},
        "critic": critic,
        "exploration": exploration,
    }
    return from_dict(Config, sections | more)


def test_what_fits_is_let_through(models: Path) -> None:
    preflight.check(_config(models, "gae", {"num_heads": 2}, CDE))
    preflight.check(_config(models, "gae", {"path": str(models / "small")}, {"cde": {}}))
    preflight.check(_config(models, "grpo", {"path": "nowhere"}, {"cde": {}}))


def test_held_out_sources_are_there_and_told_apart_by_name(models: Path) -> None:
    data = {"path": str(models / "data.jsonl"), "max_prompt_length": 16, "template": "raw"}
    for others, message in (
        (["data.jsonl", "sub/data.jsonl"], "two of data, data have one name"),
        (["data.jsonl", "absent.jsonl"], "data.eval_sources=.*absent.jsonl: there is no such file"),
    ):
        sources = [{"path": str(models / name)} for name in others]
        (models / "sub").mkdir(exist_ok=True)
        (models / "sub/data.jsonl").write_bytes((models / "data.jsonl").read_bytes())
        with pytest.raises(ConfigError, match=message):
            preflight.check(_config(models, "grpo", {}, {}, data=data | {"eval_sources": sources}))


def test_signed_rewards_of_a_sum_lie_between_minus_one_and_one(models: Path) -> None:
    signed = {"reward": {"scale": "signed"}}
    preflight.check(_config(models, "grpo", {}, {}, verifier="0.9*countdown + 0.1*format", **signed))
    preflight.check(_config(models, "grpo", {}, {}, verifier="1.0*countdown + 1.0*format"))
    with pytest.raises(ConfigError, match=r"1.0\*countdown \+ 1.0\*format' go to 2: choose weights that add up to 1"):
        preflight.check(_config(models, "grpo", {}, {}, verifier="1.0*countdown + 1.0*format", **signed))


def test_what_no_rank_could_use_is_refused_before_an_earlier_run_is_replaced(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer knows 257 tokens, its model 211: a byte of "€" is number 224."""
    (models / "accent.jsonl").write_text('{"prompt": "\u20ac", "answer": {"numbers": [1], "target": 1}}\n')
    (models / "nameless.jsonl").write_text('{"text": "1,2,3=6>", "answer": {"numbers": [1, 2, 3], "target": 6}}\n')
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    data = {"path": str(models / "data.jsonl"), "max_prompt_length": 16, "template": "raw"}
    for section, value, message in (
        ("data", data | {"path": str(models / "accent.jsonl")}, "accent/1 holds token 2.., but the model has 211"),
        ("data", data | {"path": str(models / "nameless.jsonl")}, "no field prompt or .*: set data.prompt_field"),
        ("data", data | {"eval_path": str(models / "nameless.jsonl")}, "nameless.jsonl has no field prompt"),
        ("data", data | {"max_prompt_length": 3}, "no usable row in data.jsonl"),
        ("logging", {"wandb_project": "rlvr"}, "logging.wandb_project=rlvr but wandb is not installed: pip install"),
    ):
        run = {"dir": str(tmp_path), "overwrite": True}
        with pytest.raises(ConfigError, match=message):
            train._prepare(_config(models, "grpo", {}, {}, run=run, **{section: value}))
        assert (tmp_path / "config.yaml").read_text() == "seed: 7\n", section


@pytest.mark.parametrize(
    ("advantage", "heads", "message"),
    [
        ("grpo", 4, "heads disagree, which takes 2 heads, but the run has no critic: set algorithm.advantage=gae"),
        ("gae", 1, "the run has critic.num_heads=1: set .* critic.num_heads to at least 2"),
    ],
)
def test_a_critic_bonus_without_heads_that_could_disagree(models: Path, advantage, heads, message) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight.check(_config(models, advantage, {"num_heads": heads}, CDE))


def test_a_critic_that_does_not_fit_the_policy(models: Path) -> None:
    with pytest.raises(ConfigError, match="critic.path='nowhere' is not a folder"):
        preflight.check(_config(models, "gae", {"path": "nowhere"}, {}))
    with pytest.raises(ConfigError, match="critic.path=.*other has 97 tokens, the policy 211"):
        preflight.check(_config(models, "gae", {"path": str(models / "other")}, {}))
    with pytest.raises(ConfigError, match="parallel.pp=4 must divide the model's 2 layers"):
        preflight.check(_config(models, "gae", {"path": str(models / "small")}, {}, parallel={"pp": 4}))
