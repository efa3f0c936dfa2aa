"""A changed config is said aloud, or refused where the run would be another one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.checkpoint_folder import inventory
from megatron_rlvr.config import Config, ConfigError, from_dict, to_dict
from megatron_rlvr.config_changes import FREE, MEANING, ROUNDING, check_newest, check_resume, describe, settings_of
from megatron_rlvr.types import Prompt
from tests.tiny import make_folder

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
        ({"reward": {"max_error_share": 0.3}}, "reward.max_error_share: 0.1 -> 0.3"),
        ({"critic": {"num_heads": 3}}, "critic.num_heads: 1 -> 3"),  # there is none
        ({"critic": {"optimizer": {"distributed": False}}}, "critic.optimizer.distributed: True -> False"),
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
        ({"exploration": {"cde": {}}}, r"exploration.cde: \(absent\) -> on"),
        ({"algorithm": {"clip_high": 0.3}}, "algorithm.clip_high: 0.2 -> 0.3 .*the loss is another one"),
        ({"model": {"logits": "fused_float32"}}, "model.logits: auto -> fused_float32 .*hundredths of a nat"),
    ],
)
def test_another_run_is_refused_unless_it_is_accepted(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}.*run.accept_changes=true"):
        check_resume(settings(), settings(tree), accepted=False)
    assert any(line.startswith("changed since") for line in check_resume(settings(), settings(tree), accepted=True))


PPO = {"advantage": "gae"}


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ({}, {"algorithm": PPO}, "algorithm.advantage: grpo -> gae (the checkpoint holds no critic)"),
        ({}, {"model": {"dtype": "float32"}}, "dtype: bfloat16 -> float32 (the checkpoint's weights are bfloat16)"),
        ({"algorithm": PPO}, {"algorithm": PPO, "critic": {"num_heads": 3}}, "1 -> 3 (the checkpoint's critic has 1)"),
    ],
)
def test_what_the_checkpoint_has_no_tensors_for_is_refused_even_where_it_is_accepted(
    old: dict[str, Any], new: dict[str, Any], line: str
) -> None:
    for accepted in (False, True):
        with pytest.raises(ConfigError, match="(?s)no run can go on.*set these back, or begin a new run") as error:
            check_resume(settings(old), settings(new), accepted)
        assert line in str(error.value) and "accept_changes" not in str(error.value)


def test_logits_of_the_same_precision_differ_in_their_last_bits() -> None:
    for same in ({"trainer": {"updates_per_rollout": 2}}, {"model": {"dropout": 0.1}}):
        model = {"logits": "fused_float32"} | same.get("model", {})
        (line,) = describe(settings(same), settings(same | {"model": model})).rounding
        assert line.startswith("model.logits: auto -> fused_float32 (sums in another order")
    (line,) = describe(settings(), settings({"model": {"logits": "fused"}})).rounding
    assert line.startswith("model.logits: auto -> fused (sums in another order")


def test_the_schedule_of_a_critic_counts_where_there_is_one() -> None:
    decaying = {"critic": {"optimizer": {"schedule": "linear"}}}
    for algorithm, kind in (({}, "free"), (PPO, "other")):
        old = settings({"algorithm": algorithm, **decaying})
        new = settings({"algorithm": algorithm, **decaying, "trainer": {"num_steps": 9}})
        (line,) = getattr(describe(old, new), kind)
        assert line.startswith("trainer.num_steps: 100 -> 9")


def test_a_critic_may_be_left_out() -> None:
    (line,) = describe(settings({"algorithm": PPO}), settings()).other
    assert line.startswith("algorithm.advantage: gae -> grpo")


BY_MICROBATCH: list[dict[str, Any]] = [
    {"algorithm": {"reduction": "microbatch_token_mean"}},
    {"exploration": {"lp_reg": {"preset": "released_code"}}},
    {"exploration": {"kl_cov": {"scope": "microbatch"}}},
]


@pytest.mark.parametrize("method", [{}, *BY_MICROBATCH])
@pytest.mark.parametrize(
    ("old", "new", "repacks"),
    [
        ({"trainer": {"microbatch_tokens": 8192}}, {"trainer": {"microbatch_tokens": 16384}}, True),
        ({"parallel": {"dp": 1}}, {"parallel": {"dp": 2}}, True),
        ({"parallel": {"pp": 2}}, {"parallel": {"pp": 2, "vpp": 2}}, True),
        ({"parallel": {"pp": 2, "vpp": 2}}, {"parallel": {"pp": 4, "vpp": 2}}, True),
        ({"parallel": {"pp": 2, "vpp": 2}}, {"parallel": {"pp": 2, "vpp": 4}}, False),
        ({"parallel": {"pp": 1}}, {"parallel": {"pp": 4}}, False),
        ({"parallel": {"tp": 1}}, {"parallel": {"tp": 2, "cp": 2, "sequence_parallel": True}}, False),
    ],
)
def test_what_repacks_responses_is_another_run_where_the_loss_is_taken_by_microbatch(
    method: dict[str, Any], old: dict[str, Any], new: dict[str, Any], repacks: bool
) -> None:
    free, rounding, other, _ = describe(settings(method | old), settings(method | new))
    said, rest = (other, rounding) if method and repacks else (rounding, other)
    assert said and not rest and not free
    if said is other:
        assert all("packed into other ones" in line for line in other)


def test_a_default_or_preset_that_is_written_out_changes_nothing() -> None:
    written = {"preset": "paper", "rho": 0.01, "gate": "kept", "kappa": 0.02}
    short, long = ({"exploration": {"lp_reg": options}} for options in ({}, written))
    assert check_resume(settings(short), settings(long), accepted=False) == []


def test_an_option_younger_than_the_checkpoint_had_its_default() -> None:
    old = settings()
    old["exploration"] = {"lp_reg": {"rho": 0.01}}
    assert check_resume(old, settings(), accepted=False) == []
    old["exploration"] = {"lp_reg": {"rho": 0.01, "given_up": 3}}  # no option any more: all are compared as they are
    assert "exploration.lp_reg.given_up: 3 -> (absent)" in "".join(describe(old, settings()).other)


def test_a_method_more_or_less_is_one_line() -> None:
    without = settings({"exploration": {}}) | {"exploration": {}}
    (line,) = describe(without, settings()).other
    assert line.startswith("exploration.lp_reg: (absent) -> on (the method is another one")
    (line,) = describe(settings(), without).other
    assert line.startswith("exploration.lp_reg: on -> (absent)")


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


def keep(folder: Path, step: int, saved: dict[str, Any], **more: Any) -> Path:
    """A checkpoint as far as the launcher reads one: run.json and its manifest."""
    path = folder / f"checkpoints/step_{step}"
    (path / "policy").mkdir(parents=True)
    (path / "policy/.metadata").write_text("tensors")
    (path / "run.json").write_text(json.dumps({"config": saved} | more))
    files = [path / "run.json", path / "policy/.metadata"]
    (path / "manifest.json").write_text(json.dumps(inventory(path, files)))
    return path


def test_the_launcher_refuses_by_the_newest_checkpoint_that_is_whole(tmp_path: Path) -> None:
    config = from_dict(Config, BASE)
    check_newest(config, tmp_path)  # nothing to go on from
    keep(tmp_path, 9, settings({"seed": 5}))
    newest = keep(tmp_path, 10, settings())
    check_newest(config, tmp_path)
    config.seed = 1
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        check_newest(config, tmp_path)
    # The ranks will name what is damaged, and go on from the one before.
    text = (newest / "run.json").read_text()
    for damaged, content in ((newest / "run.json", "{" * len(text)), (newest / "policy/.metadata", "ten")):
        (newest / "run.json").write_text(text)
        damaged.write_text(content)
        with pytest.raises(ConfigError, match="seed: 5 -> 1"):
            check_newest(config, tmp_path)
    config.seed, config.trainer.num_steps = 5, 9  # which is no fewer than step_9 has
    check_newest(config, tmp_path)
    for path in tmp_path.glob("checkpoints/*/manifest.json"):
        path.unlink()
    config.seed = 7
    check_newest(config, tmp_path)


def test_a_run_does_not_end_before_its_newest_checkpoint(tmp_path: Path) -> None:
    """It would report steps, and leave a model, that are not those of the config."""
    keep(tmp_path, 9, settings())
    for steps in (9, 10):  # at its end there is the model to write
        check_newest(from_dict(Config, BASE | {"trainer": {"num_steps": steps}}), tmp_path)
    with pytest.raises(ConfigError, match="trainer.num_steps=8, but .*step_9 has 9 steps behind it: set at least 9"):
        check_newest(from_dict(Config, BASE | {"trainer": {"num_steps": 8}}), tmp_path)


def test_a_model_of_another_shape_is_refused_before_a_rank_starts(tmp_path: Path) -> None:
    one, other = (
        make_folder(tmp_path / str(theta), rope_parameters={"rope_type": "default", "rope_theta": theta})
        for theta in (5e3, 1e4)
    )
    held = json.loads(json.dumps(asdict(Architecture.from_folder(one)) | {"dtype": "float32", "heads": 0}))
    tree = {"model": {"path": str(one)}, "run": {"accept_changes": True}}
    keep(tmp_path, 9, settings(tree), shapes={"policy": held})
    check_newest(from_dict(Config, BASE | tree), tmp_path)
    with pytest.raises(
        ConfigError, match=r"step_9 has a policy of rope_theta 5000.0, but model.path=.* is of .* 10000.0"
    ):
        check_newest(from_dict(Config, BASE | tree | {"model": {"path": str(other)}}), tmp_path)


def test_dropout_draws_other_masks_where_the_work_is_cut_otherwise() -> None:
    for dropout, said in ((0.0, False), (0.1, True)):
        before = {"model": {"dropout": dropout}}
        lines = describe(settings(before), settings(before | {"parallel": {"tp": 2}, "rollout": {"max_running": 7}}))
        assert {line.partition(":")[0]: "masks" in line for line in lines.rounding} == {
            "parallel.tp": said,
            "rollout.max_running": False,
        }


def test_a_key_younger_than_the_checkpoint_had_its_default() -> None:
    old = settings()
    del old["algorithm"]["dual_clip"]
    assert check_resume(old, settings(), accepted=False) == []
    assert "algorithm.dual_clip: 0.0 -> 3.0" in describe(old, settings({"algorithm": {"dual_clip": 3.0}})).other[0]


# What a change of each key does to a run with a critic, constant learning rates and no dropout.
KEYS = {
    # names and places, what is read, shown, measured and kept, how long and how fast: nothing that learns sees it
    "free": {
        "": "name prepare",
        "data": "path eval_path eval_sources strict",
        "reward": "workers deadline max_error_share",
        "critic": "head_init",
        "trainer": "num_steps eval_every eval_responses eval_temperature log_rollouts save_every keep_last keep_best",
        "logging": "tensorboard wandb_project mlflow_experiment record_responses progress",
    },
    # how the same work is cut, batched or done again
    "rounding": {
        "model": "recompute logits",
        "parallel": "tp pp vpp cp dp sequence_parallel",
        "rollout": "tp max_running kv_cache_mib gpu_memory_utilization",  # how many responses are decoded together
        "optimizer": "distributed",
        "critic.optimizer": "distributed",
        "trainer": "microbatch_tokens",
    },
    # which prompts in which order, how they are sampled and judged, what the loss is, what an update does
    "other": {
        "": "seed verifier",
        "model": "path dropout",
        "data": "sources prompt_field answer_field template repeats max_prompt_length shuffle contents",
        "reward": "scale",
        "rollout": "prompts_per_step responses_per_prompt max_response_length temperature",
        "algorithm": "advantage whiten loss clip_low clip_high dual_clip reduction",
        "algorithm.kl": "coefficient estimator k3_clamp where",
        "optimizer": "lr min_lr schedule warmup_steps weight_decay betas eps clip_grad",
        "critic": "path share share_of gamma lam value_clip warmup_steps",
        "critic.optimizer": "lr min_lr schedule warmup_steps weight_decay betas eps clip_grad",
        "trainer": "updates_per_rollout",
    },
    # the tensors of a checkpoint
    "impossible": {"model": "dtype", "critic": "num_heads"},
}


def leaves(tree: dict[str, Any], above: str = "") -> list[str]:
    found = [
        leaves(value, f"{above}{key}.") if isinstance(value, dict) else [above + key] for key, value in tree.items()
    ]
    return [name for names in found for name in names]


def with_another(tree: dict[str, Any], name: str) -> dict[str, Any]:
    first, _, rest = name.partition(".")
    return tree | {first: with_another(tree[first], rest) if rest else "another"}


def test_a_changed_key_is_told_by_what_it_does_to_the_run() -> None:
    run = settings_of(from_dict(Config, {"algorithm": PPO}), PROMPTS)
    told = {}
    for name in leaves(run):
        for kind, lines in describe(run, with_another(run, name))._asdict().items():
            assert all(line.startswith(f"{name}: ") for line in lines)
            told |= dict.fromkeys([name] * len(lines), kind)
    assert told == {
        f"{section}.{key}".lstrip("."): kind
        for kind, sections in KEYS.items()
        for section, keys in sections.items()
        for key in keys.split()
    }


def test_every_name_in_the_tables_is_a_key() -> None:
    def has(tree: Any, name: str) -> bool:
        first, _, rest = name.partition(".")
        return isinstance(tree, dict) and first in tree and (not rest or has(tree[first], rest))

    known = to_dict(Config()) | {}
    known["data"]["contents"] = ""
    assert [name for name in [*FREE, *ROUNDING, *MEANING] if not has(known, name)] == []
