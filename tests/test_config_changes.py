"""A changed config is said aloud, or refused where the run would be another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.config import Config, ConfigError, from_dict, to_dict
from megatron_rlvr.config_changes import FREE, MEANING, ROUNDING, check_newest, check_resume, describe, settings_of
from megatron_rlvr.types import Prompt

PROMPTS = [Prompt("train/1", "1+1=", (1, 2), "math", "2"), Prompt("train/2", "2+2=", (2, 2), "math", "4")]
BASE: dict[str, Any] = {"exploration": {"lp_reg": {"rho": 0.01}}, "run": {"dir": "runs/a"}}


def settings(tree: dict[str, Any] | None = None, prompts: list[Prompt] = PROMPTS) -> dict[str, Any]:
    merged = {
        key: BASE.get(key, {}) | value if isinstance(value, dict) else value for key, value in (tree or {}).items()
    }
    return settings_of(from_dict(Config, BASE | merged), prompts)


def test_the_same_config_says_nothing() -> None:
    assert check_resume(settings(), settings(), accepted=False) == []


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"trainer": {"num_steps": 500}}, "trainer.num_steps: 100 -> 500"),
        ({"logging": {"tensorboard": False}}, "logging.tensorboard: True -> False"),
        ({"data": {"path": "moved.jsonl"}}, "data.path:  -> moved.jsonl"),
        ({"parallel": {"tp": 2}}, "parallel.tp: 1 -> 2 (sums in another order: last bits differ)"),
    ],
)
def test_what_changes_nothing_or_last_bits_is_said(tree: dict[str, Any], line: str) -> None:
    assert check_resume(settings(), settings(tree), accepted=False) == [f"changed since the checkpoint: {line}"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"seed": 1}, "seed: 0 -> 1 .*drawn anew"),
        (
            {"rollout": {"prompts_per_step": 16}},
            "rollout.prompts_per_step: 32 -> 16 .*behind the prompts already taken",
        ),
        ({"data": {"shuffle": False}}, "data.shuffle: True -> False .*the position in the old order means nothing"),
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr: 1e-06 -> 0.5 .*moments and the number of updates are kept"),
        ({"optimizer": {"schedule": "cosine"}, "trainer": {"num_steps": 9}}, "trainer.num_steps.*decay ends"),
        ({"exploration": {"lp_reg": {"rho": 0.2}}}, "exploration.lp_reg.rho: 0.01 -> 0.2"),
        ({"exploration": {"cde": {}}}, r"exploration.cde: \(absent\) -> {}"),
        ({"algorithm": {"clip_high": 0.3}}, "algorithm.clip_high: 0.2 -> 0.3 .*the loss is another one"),
    ],
)
def test_another_run_is_refused_unless_it_is_accepted(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}.*run.accept_changes=true"):
        check_resume(settings(), settings(tree), accepted=False)
    assert any(line.startswith("changed since") for line in check_resume(settings(), settings(tree), accepted=True))


def test_a_swapped_data_set_is_seen_under_the_same_name() -> None:
    swapped = [PROMPTS[0], Prompt("train/2", "2+2=", (2, 2), "math", "5")]
    with pytest.raises(ConfigError, match="data.contents: 2 prompts, .* -> 2 prompts, .*other prompts"):
        check_resume(settings(), settings(prompts=swapped), accepted=False)
    with pytest.raises(ConfigError, match="data.contents"):
        check_resume(settings(), settings(prompts=PROMPTS[::-1]), accepted=False)


def test_the_files_of_a_mixture_may_move_but_not_change_their_weights() -> None:
    def mixed(*sources: dict[str, Any]) -> dict[str, Any]:
        return settings({"data": {"sources": list(sources)}})

    before = mixed({"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 0.5})
    moved = mixed({"path": "/new/a.jsonl"}, {"path": "/new/b.jsonl", "weight": 0.5})
    assert check_resume(before, moved, accepted=False) == []
    with pytest.raises(ConfigError, match="data.sources: "):
        check_resume(before, mixed({"path": "a.jsonl"}, {"path": "b.jsonl"}), accepted=False)


def test_a_run_folder_may_move() -> None:
    def moved(folder: str) -> dict[str, Any]:
        return settings({"run": {"dir": folder}, "model": {"path": str(Path(folder) / "initial_hf")}})

    assert check_resume(moved("runs/a"), moved("elsewhere/b"), accepted=False) == []


def test_random_weights_are_the_folder_that_they_were_drawn_into() -> None:
    drawn = settings({"model": {"path": "shapes/small", "random_init": True}})
    assert check_resume(settings({"model": {"path": "runs/a/initial_hf"}}), drawn, accepted=False) == []


def test_the_launcher_refuses_by_the_newest_checkpoint(tmp_path: Path) -> None:
    config = from_dict(Config, BASE)
    check_newest(config, tmp_path)  # nothing to go on from
    for step, saved in ((9, settings({"seed": 5})), (10, settings())):
        (tmp_path / f"checkpoints/step_{step}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step_{step}/run.json").write_text(json.dumps({"config": saved}))
    check_newest(config, tmp_path)
    config.seed = 1
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        check_newest(config, tmp_path)
    (tmp_path / "checkpoints/step_10/run.json").write_text("{")
    check_newest(config, tmp_path)  # damaged: for the ranks to find


def test_a_key_younger_than_the_checkpoint_had_its_default() -> None:
    old = settings()
    del old["algorithm"]["dual_clip"]
    assert check_resume(old, settings(), accepted=False) == []
    assert "algorithm.dual_clip: 0.0 -> 3.0" in describe(old, settings({"algorithm": {"dual_clip": 3.0}}))[2][0]


def test_every_name_in_the_tables_is_a_key() -> None:
    def has(tree: Any, name: str) -> bool:
        first, _, rest = name.partition(".")
        return isinstance(tree, dict) and first in tree and (not rest or has(tree[first], rest))

    known = to_dict(Config()) | {}
    known["data"]["contents"] = ""
    assert [name for name in [*FREE, *ROUNDING, *MEANING] if not has(known, name)] == []
