"""Config files: inclusion, overrides, and one clear sentence for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_rlvr.config import ConfigError, batch_table, check, dump, load_config, to_dict

SMALLEST = {"verifier": "math", "model": {"path": "model"}, "data": {"path": "data.jsonl"}}
SMALLEST["trainer"] = {"microbatch_tokens": 4096}
PPO = Path(__file__).parents[1] / "examples/countdown_cpu/ppo.yaml"


def write(folder: Path, file: str = "run.yaml", /, **tree) -> Path:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_overrides_change_single_keys(tmp_path):
    path = write(tmp_path, **SMALLEST, optimizer={"lr": "1e-6"}, exploration={"lp_reg": {"rho": 0.01, "beta": 2.0}})
    config = load_config(
        path, ["parallel.tp=2", "exploration.lp_reg.rho=0.02", "exploration.cde={}", "data.eval_path="]
    )
    assert (config.parallel.tp, config.optimizer.lr, config.data.eval_path) == (2, 1e-6, "")
    assert config.exploration == {"lp_reg": {"rho": 0.02, "beta": 2.0}, "cde": {}}
    assert config.rollout_tp == 2 and config.world_size == 2 and config.run_dir == Path("runs/run")


def test_the_dumped_config_is_the_config(tmp_path):
    config = load_config(write(tmp_path, **SMALLEST, exploration={"lp_reg": {"rho": 0.01}}))
    dump(config, tmp_path / "dumped.yaml")
    assert load_config(tmp_path / "dumped.yaml") == config


def test_a_file_holds_what_differs_from_its_bases(tmp_path):
    write(tmp_path, "shared/base.yaml", **SMALLEST, optimizer={"lr": 1e-6, "betas": [0.9, 0.95]}, name="base")
    write(tmp_path, "shared/model.yaml", base="base.yaml", model={"dtype": "float32"}, optimizer={"lr": 1e-5})
    write(tmp_path, "other.yaml", exploration={"cde": {}}, name="other")
    path = write(
        tmp_path, base=["shared/model.yaml", "other.yaml"], optimizer={"betas": [0.8, 0.9]}, exploration={"lp_reg": {}}
    )
    config = load_config(path, ["seed=3"])
    assert (config.model.path, config.model.dtype) == ("model", "float32")
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-5, [0.8, 0.9])
    assert config.exploration == {"cde": {}, "lp_reg": {}}
    assert (config.name, config.seed) == ("other", 3)
    assert "base" not in to_dict(config)
    write(tmp_path, "plain.yaml", base="run.yaml", exploration=None)
    assert load_config(tmp_path / "plain.yaml").exploration == {}


def test_false_leaves_out_a_method_of_a_base(tmp_path):
    write(tmp_path, "base.yaml", **SMALLEST, exploration={"lp_reg": {}, "entropy_bonus": {}})
    path = write(tmp_path, base="base.yaml", exploration={"lp_reg": False})
    assert load_config(path).exploration == {"entropy_bonus": {}}
    assert load_config(path, ["exploration.entropy_bonus=false"]).exploration == {}
    assert load_config(path, ["exploration.lp_reg={}"]).exploration == {"lp_reg": {}, "entropy_bonus": {}}


def test_bases_that_cannot_be_read(tmp_path):
    path = write(tmp_path, base="missing.yaml")
    error = refusal(path)
    assert "missing.yaml" in error and str(path) in error and "No such file" in error
    write(tmp_path, "a.yaml", base="b.yaml")
    assert "includes itself" in refusal(write(tmp_path, "b.yaml", base="a.yaml"))
    assert "base must be" in refusal(write(tmp_path, base=3))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("paralel.tp=2", "unknown key 'paralel'; did you mean 'parallel'"),
        ("parallel.tq=2", "unknown key 'parallel.tq'; did you mean 'parallel.tp'"),
        ("parallel.tp=two", "parallel.tp must be of type int, not 'two'"),
        ("parallel.tp=true", "parallel.tp must be of type int"),
        ("optimizer.lr=true", "optimizer.lr must be of type float, not True"),
        ("algorithm.loss=pbo", "algorithm.loss must be one of"),
        ("optimizer.betas=0.9", "optimizer.betas must be a list"),
        ("parallel=2", "parallel must be a mapping"),
        (
            "exploration.lp_reg=null",
            "exploration.lp_reg is null, which could mean on or off: write {} for its defaults, false to leave it out",
        ),
        (
            "exploration.lp_reg=true",
            "lp_reg must be a mapping, not True: write {} for its defaults, false to leave it out",
        ),
        ("seed.x=2", "'seed' holds a value, not keys: 1"),
        ("name=2026", "name must be of type str, not 2026: write it in quotes that YAML sees, name='\"2026\"'"),
        ("model={path: a, path: b}", "is not a YAML value"),
        ("run.hang_timeout=.inf", "run.hang_timeout must be a finite number, not inf"),
        ("run.hang_timeout=0", "run.hang_timeout must be above 0 seconds, not 0"),
        ("optimizer.eps=nan", "optimizer.eps must be a finite number, not nan"),
        ("run.port=99999", "run.port must be in 0..65535, not 99999"),
        ("reward.max_error_share=10", "reward.max_error_share must be in [0, 1], not 10"),
        ("name=..", "name='..' is no name for a folder in runs/: give a plain one, or set run.dir"),
        ("name=a/../../b", "is no name for a folder in runs/"),
        ("parallel.tp", "must look like key.sub=value"),
        ("seed=[1", "is not a YAML value"),
        ("parallel.tp=0", "parallel.tp must be at least 1"),
        ("parallel.vpp=2", "needs parallel.pp > 1"),
        ("parallel.sequence_parallel=true", "needs parallel.tp > 1"),
        ("rollout.tp=3", "rollout.tp=3 must divide"),
        ("trainer.updates_per_rollout=3", "must divide rollout.prompts_per_step=32"),
        ("parallel.dp=3", "parallel.dp=3 must divide"),
        (
            "parallel={pp: 3, vpp: 2}",
            "which parallel.dp=1 x parallel.pp=3 (stages of parallel.vpp interleave) must divide",
        ),
        ("reward.workers=0", "reward.workers must be at least 1, not 0"),
        ("trainer.microbatch_tokens=100", "must hold the longest response with its prompt"),
        ("rollout.temperature=0", "rollout.temperature must be in [0.01, 2]"),
        ("trainer.eval_temperature=0.005", "trainer.eval_temperature must be in [0.01, 2]"),
        ("optimizer.min_lr=0.1", "optimizer.min_lr=0.1 must be at most optimizer.lr="),
        ("optimizer.min_lr=1e-7", "optimizer.schedule=constant does not: drop one of them"),
        ("algorithm.dual_clip=0.5", "algorithm.dual_clip must be above 1"),
        ("optimizer.lr=0", "optimizer.lr must be above 0"),
        ("optimizer.betas=[2, 3]", "optimizer.betas must hold two numbers in [0, 1), not [2.0, 3.0]"),
        ("critic.optimizer.betas=[0.9, 1]", "critic.optimizer.betas must hold two numbers in [0, 1)"),
        ("optimizer.eps=-1", "optimizer.eps must be above 0, not -1"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay must be at least 0, not -1"),
        ("rollout.tp=-1", "rollout.tp must be at least 0, not -1"),
        ("rollout.max_running=0", "rollout.max_running must be at least 1, not 0"),
        ("rollout.gpu_memory_utilization=1.5", "rollout.gpu_memory_utilization must be in (0, 1], not 1.5"),
        ("trainer.eval_responses=0", "trainer.eval_responses must be at least 1, not 0"),
        ("trainer.save_every=-1", "trainer.save_every must be at least 0, not -1"),
        ("model.dropout=1", "model.dropout must be in [0, 1)"),
        ("trainer.keep_last=0", "trainer.keep_last must be at least 1"),
        ("trainer.keep_best=1", "trainer.keep_best=1 needs trainer.save_every: with 0 a run writes one checkpoint"),
        ("trainer={keep_best: 1, save_every: 5}", "trainer.keep_best=1 needs held-out figures of every checkpoint"),
        ("reward.deadline=0", "reward.deadline must be above 0 seconds, not 0"),
        ("verifier=", "verifier is not set"),
        ("model.path=", "model.path is not set"),
        ("data.path=", "data.path is not set"),
        ("data.sources=[{path: a}]", "are both set: list the file in data.sources"),
        ("data={sources: [{weight: 2}]}", "data.sources[0] has no path"),
        ("data={sources: [{path: a}, {path: b, weight: 0}]}", "data.sources[1].weight must be above 0, not 0"),
        ("data={path: a, eval_path: b, eval_sources: [{path: b}]}", "data.eval_path=b and data.eval_sources are both"),
        ("data={path: a, eval_sources: [{path: b, weight: 2}]}", "eval_sources[0].weight=2.0: an evaluation takes"),
        ("data={sources: [{file: a}]}", "unknown key 'data.sources[0].file'"),
    ],
)
def test_each_mistake_has_its_sentence(tmp_path, override, message):
    path = write(tmp_path, **SMALLEST, seed=1)
    load_config(path)
    assert message in refusal(path, override)


def test_every_checkpoint_that_may_be_the_best_is_measured(tmp_path):
    path = write(tmp_path, **SMALLEST)
    measured = ["data.eval_path=e", "trainer.keep_best=1", "trainer.save_every=6"]
    load_config(path, [*measured, "trainer.eval_every=3"])
    assert "(now 4) so that it divides trainer.save_every (6)" in refusal(path, *measured, "trainer.eval_every=4")


def test_rewards_that_are_signed_already_are_not_signed_again(tmp_path):
    path = write(tmp_path, **SMALLEST)
    for verifier in ("dapo", "0.9*dapo + 0.1*format"):
        said = refusal(path, f"verifier={verifier}", "reward.scale=signed")
        assert "verifier=dapo gives -1 and +1 already" in said
        load_config(path, [f"verifier={verifier}"])


def test_what_a_file_says_twice_or_by_an_alias(tmp_path):
    twice = tmp_path / "twice.yaml"
    twice.write_text("verifier: math\ntrainer: {num_steps: 7}\nmodel: {path: m}\ntrainer: {eval_every: 2}\n")
    assert "twice.yaml is not valid YAML: 'trainer' is there twice" in refusal(twice) and "line 4" in refusal(twice)
    alias = tmp_path / "alias.yaml"
    alias.write_text(
        "verifier: math\nmodel: {path: m}\ndata: {path: d}\noptimizer: &o {lr: 1e-6}\ncritic: {optimizer: *o}\n"
    )
    config = load_config(alias, ["critic.optimizer.lr=1e-5"])
    assert (config.optimizer.lr, config.critic.optimizer.lr) == (1e-6, 1e-5)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: café".encode("latin-1"))
    assert "latin.yaml is not UTF-8 text" in refusal(latin)


def test_an_override_reaches_into_an_empty_section_and_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = write(tmp_path, **SMALLEST, exploration=None, optimizer=None)
    overrides = ["exploration.lp_reg.rho=0.05", "optimizer.lr=2e-6", "run.dir=~/runs/x", "data.path=~/d.jsonl"]
    config = load_config(path, overrides)
    assert (config.exploration, config.optimizer.lr) == ({"lp_reg": {"rho": 0.05}}, 2e-6)
    assert (str(config.run_dir), config.data.path) == ("/home/me/runs/x", "/home/me/d.jsonl")


def test_files_that_are_no_configs(tmp_path):
    assert "cannot read the config" in refusal(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert "must hold a mapping" in refusal(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    assert "is not valid YAML" in refusal(tmp_path / "broken.yaml")


def test_the_table_says_what_the_batch_sizes_come_to(tmp_path):
    config = load_config(
        write(tmp_path, **SMALLEST), ["parallel.tp=2", "parallel.dp=4", "trainer.updates_per_rollout=4"]
    )
    table = {what: value for what, value, _ in batch_table(config)}
    assert table["ranks"] == "8" and table["engine replicas"] == "4"
    assert table["responses per step"] == "256" and table["responses per update"] == "64"
    assert table["microbatches per update and rank"] == "<= 8"  # 16 responses, two of 2048 tokens in each
    config.rollout.responses_per_prompt = 9  # 18 responses
    assert config.most_microbatches == 9
    config.rollout.prompts_per_step, config.rollout.responses_per_prompt = 4, 20  # 5 on each rank
    assert config.most_microbatches == 3
    config.parallel.pp, config.parallel.vpp = 2, 2
    assert config.most_microbatches == 4  # stages interleave


def test_a_critic_is_there_where_advantages_come_from_gae() -> None:
    config = load_config(PPO)
    assert config.has_critic and config.critic_warmup == config.critic.warmup_steps > 0
    config = load_config(PPO, ["algorithm.advantage=grpo", "critic.num_heads=0"])  # then nobody reads the section
    assert not config.has_critic and config.critic_warmup == 0
    check(config)


def test_the_critic_has_a_learning_rate_of_its_own() -> None:
    config = load_config(PPO, ["critic={optimizer: {weight_decay: 0.1}}", "optimizer={}"])
    assert config.critic.optimizer.lr == 1e-5 and config.optimizer.lr == 1e-6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["critic.num_heads=0"], "critic.num_heads must be at least 1, not 0"),
        (["critic.head_init=0"], "critic.head_init must be above 0"),
        (["critic.share=0"], r"critic.share must be in \(0, 1\], not 0"),
        (["critic.share=1.5"], r"critic.share must be in \(0, 1\]"),
        (["critic.share=0.2"], "critic.share=0.2 of critic.num_heads=4 .* would teach no head"),
        (["critic.share=0.01", "critic.num_heads=128"], "an update's 64 responses is less than one, .* without data"),
        (["critic.share_of=heads"], "critic.share_of must be one of 'responses', 'tokens'"),
        (["critic.gamma=1.1"], r"critic.gamma must be in \[0, 1\]"),
        (["critic.lam=-0.1"], r"critic.lam must be in \[0, 1\]"),
        (["critic.value_clip=-1"], "critic.value_clip must be at least 0"),
        (["critic.optimizer.lr=0"], "critic.optimizer.lr must be above 0"),
        (["critic.warmup_steps=100", "trainer.num_steps=100"], "warmup_steps=100 must be below trainer.num_steps=100"),
        (["critic.heads=2"], "unknown key 'critic.heads'"),
    ],
)
def test_critics_that_cannot_learn_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(PPO, overrides)


def test_a_head_may_draw_few_tokens() -> None:
    assert load_config(PPO, ["critic.share=0.01", "critic.num_heads=128", "critic.share_of=tokens"]).has_critic
