from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rlvr import exploration
from megatron_rlvr.config import Config, ConfigError, RolloutConfig, load_config
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.vocab import StatisticsOptions
from megatron_rlvr.exploration.base import Composite, Exploration, Needs, Threshold, build, filled, method_names
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Prompt, Rollout, RolloutGroup
from megatron_rlvr.verdict import Verdict
from tests.exploration.toy import fill_old, make_batch, make_logits, statistics, update_loss

ROOT = Path(__file__).parents[2]

METHOD = """
from dataclasses import dataclass

from megatron_rlvr.exploration.base import Exploration, Needs


@dataclass
class Config:
    factor: float = 2.0


class Louder(Exploration):
    order = {order}
    seen = 0

    def needs(self):
        return Needs(old_statistics=True)

    def annotate_sample(self, log_probs, top_log_probs):
        return {{self.name + "/gap": [row[0] - log_prob for log_prob, row in zip(log_probs, top_log_probs)]}}

    def keep_group(self, group):
        return len(group.rollouts) > 1

    def annotate(self, batch, old, reference=None):
        return {{self.name + "/entropy": old.entropy}}

    def shape_rewards(self, batch, groups, step, meter):
        return batch.rewards * self.config.factor

    def shape_raw_advantages(self, batch, groups, step, meter):
        return batch.advantages * self.config.factor

    def shape_advantages(self, batch, groups, step, meter):
        return batch.advantages + self.config.factor

    def prepare_update(self, batch, update, groups):
        self.seen += update.num_tokens

    def policy_loss(self, losses, micro, current, meter):
        return losses * self.config.factor

    def state_dict(self):
        return {{"seen": self.seen}}

    def load_state_dict(self, state):
        self.seen = state["seen"]
"""


@pytest.fixture
def methods_folder(tmp_path, monkeypatch):
    """A folder whose files are methods too."""
    monkeypatch.setattr(exploration, "__path__", [*exploration.__path__, str(tmp_path)])
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(f"{exploration.__name__}.{file.stem}", None)
        vars(exploration).pop(file.stem, None)


def test_adding_a_method_is_adding_a_file(methods_folder):
    assert "louder" not in method_names()
    (methods_folder / "louder.py").write_text(METHOD.format(order=10))
    assert {"louder", "lp_reg", "cde", "entropy_bonus"} <= set(method_names())
    method = build({"louder": {"factor": 3}})
    batch = make_batch([2, 3])
    batch.rewards = torch.tensor([1.0, -1.0])
    assert torch.equal(method.shape_rewards(batch, ParallelGroups.single(), 0, Meter()), torch.tensor([3.0, -3.0]))
    with pytest.raises(ConfigError, match="exploration.louder.factr.*exploration.louder.factor"):
        build({"louder": {"factr": 3}})


def test_the_readmes_method_works_as_it_stands_there(methods_folder, tmp_path_factory):
    """Its block of code in the file that its first line names, switched on and overridden as the text below it says."""
    _, section = (ROOT / "README.md").read_text().split("## Add a method", 1)
    code, rest = section.split("```python\n")[1].split("```", 1)
    named, switch, override = code.splitlines()[0].removeprefix("# "), *re.findall(r"`(exploration[^`]*)`", rest)[:2]
    assert Path(named).parent == Path("megatron_rlvr/exploration") and len(code.splitlines()) <= 40
    (methods_folder / Path(named).name).write_text(code)
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.yaml").write_text(f"verifier: math\nmodel: {{path: m}}\ndata: {{path: d}}\n{switch}\n")
    batch, meter = make_batch([2, 6]), Meter()
    for overrides, strength in ([], 0.2), ([override], 0.3):
        config = load_config(folder / "config.yaml", overrides)
        method = build(config.exploration | {"lp_reg": {}}, config)
        shaped = method.shape_rewards(batch, ParallelGroups.single(), 0, meter)
        assert torch.allclose(shaped, strength * torch.tensor([3.0, 7.0]).log())
    assert "novelty/bonus" in meter.means()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (METHOD.format(order=10).replace("class Config", "class Options"), "louder.py has no dataclass named Config"),
        (METHOD.format(order=10) + "\n\nclass Twice(Louder):\n    pass\n", "hold one subclass of Exploration, not 2"),
        ("from dataclasses import dataclass\n\n\n@dataclass\nclass Config:\n    pass\n", "not 0"),
        (
            "\nimport nothing_of_that_name\n",
            "'louder' cannot be loaded: .*louder.py, line 2: ModuleNotFoundError",
        ),
        ("class Config\n", "method 'louder' cannot be loaded: .*louder.py, line 1: SyntaxError"),
        (METHOD.format(order=10).replace("@dataclass\n", ""), "louder.py has no dataclass named Config"),
        (
            METHOD.format(order=10) + "\n    def __init__(self, name):\n        pass\n",
            "method 'louder' cannot be loaded: .*louder.py: TypeError: .*__init__",
        ),
        (
            METHOD.format(order=10).replace(
                "factor: float = 2.0",
                "factor: float = 2.0\n    def __post_init__(self):\n        raise ValueError('too loud')",
            ),
            "exploration.louder: too loud",
        ),
    ],
)
def test_a_file_that_is_no_method_is_refused(methods_folder, code, message):
    (methods_folder / "louder.py").write_text(code)
    with pytest.raises(ConfigError, match=message):
        build({"louder": {}})


def test_methods_pass_through_each_hook_in_their_declared_order(methods_folder):
    (methods_folder / "louder.py").write_text(METHOD.format(order=60))
    (methods_folder / "shifter.py").write_text(
        METHOD.format(order=40).replace("* self.config.factor", "+ self.config.factor")
    )
    method = build({"louder": {"factor": 10.0}, "shifter": {"factor": 1.0}})
    batch, groups = make_batch([2, 3]), ParallelGroups.single()
    batch.rewards = torch.tensor([1.0, -1.0])
    before = batch.advantages.clone()
    assert torch.equal(method.shape_rewards(batch, groups, 0, Meter()), torch.tensor([20.0, 0.0]))
    assert torch.allclose(method.shape_advantages(batch, groups, 0, Meter()), before + 11)
    assert torch.allclose(method.shape_raw_advantages(batch, groups, 0, Meter()), (before + 1) * 10)
    assert torch.equal(batch.rewards, torch.tensor([1.0, -1.0])) and torch.equal(batch.advantages, before)
    old = statistics(make_logits(batch), batch, method)
    assert set(method.annotate(batch, old)) == {"louder/entropy", "shifter/entropy"}
    assert method.annotate_sample([-2.0], [[-0.5, -2.0]]) == {"louder/gap": [1.5], "shifter/gap": [1.5]}
    zeros = torch.zeros(batch.num_tokens)
    assert torch.equal(method.policy_loss(zeros, batch, old, Meter()), zeros + 10)
    prompt = Prompt("0", "", (1,), "math", 0)
    rollouts = [Rollout(place, [1], [0.0], "stop", 0) for place in range(2)]
    assert method.keep_group(RolloutGroup(prompt, rollouts))
    assert not method.keep_group(RolloutGroup(prompt, rollouts[:1]))
    alone = RolloutGroup(prompt, [replace(rollouts[0], verdict=Verdict(1.0, "ok"))])
    assert build({"dynamic_sampling": {}}).keep_group(alone)
    assert not build({"dynamic_sampling": {}, "louder": {}}).keep_group(alone)  # one that turns it away is enough


def test_the_methods_that_come_with_it_act_in_an_order_that_makes_sense():
    """CDE's bonus is on the reward that is paid; a method that replaces a token's loss comes before what adds to it."""
    run = Config(rollout=RolloutConfig(max_response_length=20))
    settings = {"entropy_bonus": {}, "rollout_correction": {}, "cde": {}, "lp_reg": {}, "overlong": {"buffer": 8}}
    names = [method.name for method in build(settings, run).methods]
    assert names.index("overlong") < names.index("cde")
    assert names.index("lp_reg") < names.index("rollout_correction") < names.index("entropy_bonus")


def test_state_survives_a_restart(methods_folder):
    (methods_folder / "louder.py").write_text(METHOD.format(order=10))
    method, batch = build({"louder": {}, "cde": {}}), make_batch([2, 3])
    method.prepare_update(batch, batch.updates[0], ParallelGroups.single())
    restarted = build({"louder": {}, "cde": {}})
    restarted.load_state_dict(method.state_dict())
    assert restarted.state_dict() == {"louder": {"seen": 5}, "cde": {}}
    changed = build({"louder": {}})
    changed.load_state_dict({"cde": {}})  # a run whose config was changed on purpose: the new method starts anew
    assert changed.state_dict() == {"louder": {"seen": 0}}


def test_no_method_changes_nothing():
    method = build({})
    batch = make_batch([3, 1, 2])
    logits = make_logits(batch)
    fill_old(batch, logits, method)
    groups, meter = ParallelGroups.single(), Meter()
    assert method.needs() == Needs() and method.needs().statistics(0.7) == StatisticsOptions(temperature=0.7)
    assert method.shape_rewards(batch, groups, 3, meter) is batch.rewards
    assert method.shape_advantages(batch, groups, 3, meter) is batch.advantages
    assert batch.extras == {} and method.state_dict() == {}
    shaped, _, metrics = update_loss(batch, logits, method, "ppo", (0.2, 0.2))
    expected = -(batch.advantages * batch.loss_mask).sum() / 6
    assert torch.allclose(shaped, expected.double(), atol=1e-6) and metrics == {}


def test_needs_merge():
    threshold = Threshold(min_p=0.02)
    merged = Needs(old_statistics=True).merge(Needs(reference=True, threshold=threshold))
    assert merged == Needs(old_statistics=True, reference=True, threshold=threshold)
    assert merged.merge(Needs(threshold=threshold)) == merged
    assert merged.statistics(0.6) == StatisticsOptions(temperature=0.6, min_p=0.02, threshold_temperature=0.6)
    assert Needs(rollout_top=3).merge(Needs(rollout_top=8, states="last")) == Needs(rollout_top=8, states="last")
    assert Needs(value_heads=2).merge(merged).value_heads == merged.merge(Needs(value_heads=2)).value_heads == 2
    fixed = Needs(threshold=Threshold(tau=0.1, temperature=1.0))
    assert fixed.statistics(0.6) == StatisticsOptions(temperature=0.6, tau=0.1, threshold_temperature=1.0)
    kept = merged.merge(Needs(old_top=5)).merge(Needs(old_top=3)).statistics(0.6)
    assert kept == StatisticsOptions(temperature=0.6, min_p=0.02, threshold_temperature=0.6, top=5)
    with pytest.raises(ConfigError, match="different thresholds.*min_p=0.02.*tau=0.1"):
        merged.merge(fixed)


class Thresholded(Exploration):
    def needs(self) -> Needs:
        return Needs(threshold=Threshold(min_p=0.5))


class Replacing(Exploration):
    excludes = "replaces_losses"


def test_what_cannot_run_together_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="one pass over the vocabulary computes one kept mass"):
        Composite([*build({"lp_reg": {}}).methods, Thresholded("other")])
    with pytest.raises(ConfigError, match="lp_reg and other cannot run together.*undo the other"):
        Composite([*build({"lp_reg": {"preset": "released_code"}}).methods, Replacing("other")])
    assert len(Composite([*build({"lp_reg": {}}).methods, Replacing("other")]).methods) == 2


LP_REG = {"rho": 0.01, "pos_rho": 0.0, "target_share": 0.0, "beta": 1.0, "protection": 1.0, "kappa": 0.02, "tau": None}
LP_REG |= {"proxy_source": "old", "proxy_size": 128}
EQ_6 = {"percentile_pool": "all_tokens", "percentile_scope": "update", "min_two": False, "threshold_temperature": 0.0}
EQ_6 |= {"gate": "kept", "divergence": "fwd_kl_full", "k3_clamp": 0.0, "replace_clipped": False}
RELEASED = {"percentile_pool": "neg_tokens", "percentile_scope": "microbatch", "min_two": True}
RELEASED |= {"threshold_temperature": 1.0, "gate": "below_proxy", "divergence": "k3_sampled", "k3_clamp": 10.0}
RELEASED |= {"replace_clipped": True}
CDE = {"kappa": 3.0, "omega_0": 1.0, "schedule": "none", "total_steps": 0, "milestones": []}
ACTOR, CRITIC = {"alpha": 1.0, "bonus_in_degenerate_groups": True}, {"alpha": 0.5, "order": "after_whitening"}
DEFAULTS = [  # method, the options given, all of them: as published, and off where they are ours
    ("lp_reg", {}, {"preset": "paper"} | LP_REG | EQ_6),
    ("lp_reg", {"preset": "released_code"}, {"preset": "released_code"} | LP_REG | RELEASED),
    ("cde", {}, {"actor": CDE | ACTOR, "critic": None}),
    ("cde", {"actor": None, "critic": {}}, {"actor": None, "critic": CDE | CRITIC}),
    ("kl_cov", {}, {"share": 0.002, "coefficient": 1.0, "scope": "update"}),
    ("clip_cov", {}, {"share": 0.0002, "low": 1.0, "high": 5.0, "scope": "update"}),
    ("high_entropy", {}, {"share": 0.2, "scope": "update"}),
    ("stapo", {}, {"tau": 0.002, "quantile": 0.75}),
    ("entropy_bonus", {}, {"coefficient": 0.002}),
    ("overlong", {}, {"buffer": 4096, "factor": 1.0}),
    ("dynamic_sampling", {}, {}),
    ("sim_hash", {}, {"bits": 16, "strength": 0.1, "projection": "gaussian", "state": "last"}),
    ("rollout_correction", {}, {"form": "tis", "low": None, "high": None, "renormalise": False}),
]


def test_every_option_is_by_default_what_was_published():
    for name, given, options in DEFAULTS:
        assert filled(name, given) == options, name
    assert {name for name, _, _ in DEFAULTS} == set(method_names()), "a method's defaults go into DEFAULTS above"
    full = filled("lp_reg", {"preset": "released_code", "divergence": "fwd_kl_full"})
    assert full == {"preset": "released_code"} | LP_REG | RELEASED | {"divergence": "fwd_kl_full", "k3_clamp": 0.0}
    assert filled("lp_reg", full) == full  # as a run's config.yaml is read again


@pytest.mark.parametrize(
    ("form", "bounds"),
    [
        *((form, (0.0, 2.0)) for form in ("tis", "sequence_tis", "mis", "sequence_mis")),
        ("icepop", (0.5, 5.0)),
        ("geometric_mask", (0.999, 1.002)),
    ],
)
def test_the_bounds_of_a_correction_are_by_default_what_was_published(form, bounds):
    (method,) = build({"rollout_correction": {"form": form}}).methods
    assert method.config.bounds == bounds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lp_rag": {}}, "unknown exploration method 'lp_rag'; did you mean 'lp_reg'"),
        ({"base": {}}, "unknown exploration method 'base'"),
        ({"lp_reg": {"roh": 0.1}}, "unknown key 'exploration.lp_reg.roh'; did you mean 'exploration.lp_reg.rho'"),
        ({"lp_reg": {"rho": 0}}, r"exploration.lp_reg.rho must be in \(0, 1\), not 0"),
        ({"lp_reg": {"rho": 1.0}}, r"rho must be in \(0, 1\)"),
        ({"lp_reg": {"pos_rho": 1.0}}, r"pos_rho must be in \[0, 1\)"),
        ({"lp_reg": {"beta": -1}}, "beta must be at least 0"),
        ({"lp_reg": {"kappa": 1.5}}, r"kappa must be in \(0, 1\]"),
        ({"lp_reg": {"tau": 1.0}}, r"tau must be in \(0, 1\)"),
        ({"lp_reg": {"tau": 0.02, "kappa": 0.02}}, "two thresholds for one proxy"),
        ({"lp_reg": {"k3_clamp": -1}}, "k3_clamp must be above 0"),
        ({"lp_reg": {"k3_clamp": 10}}, "k3_clamp=10.0 bounds .*divergence=k3_sampled alone, and that is fwd_kl_full"),
        ({"lp_reg": {"preset": "papre"}}, "exploration.lp_reg.preset must be one of 'paper', 'released_code'"),
        ({"lp_reg": {"gate": "open"}}, "exploration.lp_reg.gate must be one of 'kept', 'below_proxy'"),
        ({"cde": {"actor": {"kappa": 0}}}, "exploration.cde.actor.kappa must be above 0"),
        ({"cde": {"actor": {"alpha": -1}}}, "exploration.cde.actor.alpha must be at least 0"),
        ({"cde": {"actor": {"omega_0": 3.0}}}, r"omega_0 must be in \[0, kappa=3.0\)"),
        ({"cde": {"actor": {"omega_0": 2.0, "kappa": 2.0}}}, r"omega_0 must be in \[0, kappa=2.0\), not 2.0"),
        ({"cde": {"actor": {"schedule": "cosine"}}}, "schedule=cosine needs exploration.cde.actor.total_steps"),
        ({"cde": {"actor": {"total_steps": 9}}}, "total_steps=9 is read with schedule=linear or cosine, not none"),
        ({"cde": {"actor": {"schedule": "staircase"}}}, "go together"),
        ({"cde": {"actor": {"milestones": [[10, 0.5]]}}}, "go together"),
        ({"cde": {"actor": {"schedule": "staircase", "milestones": [[10]]}}}, r"pairs \[step, multiplier"),
        ({"cde": {"actor": {"schedule": "staircase", "milestones": [[10, 2]]}}}, r"pairs \[step, multiplier"),
        (
            {"cde": {"actor": {"schedule": "staircase", "milestones": [[10, 0.5], [10, 0]]}}},
            "in the order of their steps",
        ),
        ({"cde": {"critic": {"kappa": 0}}}, "exploration.cde.critic.kappa must be above 0"),
        ({"cde": {"critic": {"order": "never"}}}, "exploration.cde.critic.order must be one of 'after_whitening'"),
        ({"cde": {"actor": None}}, "actor and critic are both null"),
        ({"cde": {"kappa": 2}}, "unknown key 'exploration.cde.kappa'"),
        ({"entropy_bonus": {"coefficient": -0.1}}, "entropy_bonus.coefficient must be at least 0"),
    ],
)
def test_bad_options_name_the_option_and_the_rule(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(settings)


@pytest.mark.parametrize(
    ("hook", "returned", "message"),
    [
        ("shape_rewards", "batch.rewards.mean()", r"shape_rewards must return a tensor of shape \[2\], not \[\]"),
        ("shape_rewards", "batch.rewards / 0", "shape_rewards returned nan"),
        ("shape_advantages", "batch.advantages[:, None]", r"of shape \[9\], not \[9, 1\]"),
        ("shape_raw_advantages", "None", "not NoneType"),
        ("shape_raw_advantages", "batch.advantages + float('inf')", "shape_raw_advantages returned inf"),
        ("policy_loss", "losses[:, None]", r"policy_loss must return a tensor of shape \[9\], not \[9, 1\]"),
        (
            "policy_loss",
            "micro.extras.update({'lp_reg/selected': losses}) or losses",
            "policy_loss keeps in extras must be",
        ),
        (
            "policy_loss",
            "micro.extras.update({'louder/x': losses[0]}) or losses",
            r"extras\['louder/x'\] must return a tensor",
        ),
        ("annotate", "{'entropy': old.entropy}", "what annotate keeps must be called louder/..., not 'entropy'"),
        ("annotate", "{'louder/entropy': old.entropy[:2]}", r"annotate\['louder/entropy'\] must .* \[9\], not \[2\]"),
        ("annotate_sample", "{'gap': log_probs}", "what annotate_sample keeps must be called louder/..., not 'gap'"),
        ("annotate_sample", "{'louder/gap': [0.1]}", r"annotate_sample\['louder/gap'\] must .* 2 tokens, not 1"),
        ("shape_rewards", "meter.add('reward/mean', 1.0)", "a metric must be called louder/..., not 'reward/mean'"),
        ("shape_rewards", "meter.maximum('step', 1.0)", "a metric must be called louder/..., not 'step'"),
        ("shape_rewards", "meter.add('louder/x', batch.rewards)", r"metric 'louder/x' takes .* scalars, not \[2\]"),
    ],
)
def test_what_a_method_returns_wrongly_is_named_and_trains_nothing(methods_folder, hook, returned, message):
    head = re.search(rf"    def {hook}\(.*\n", METHOD)
    assert head
    wrong = METHOD.format(order=10).replace(head[0], f"{head[0]}        return {returned}\n", 1)
    (methods_folder / "louder.py").write_text(wrong)
    method, batch, groups = build({"louder": {}, "entropy_bonus": {}}), make_batch([2, 3]), ParallelGroups.single()
    old = statistics(make_logits(batch), batch, method)
    calls = {
        "annotate": lambda: method.annotate(batch, old),
        "annotate_sample": lambda: method.annotate_sample([-0.5, -1.0], [[-0.5], [-0.2, -1.0]]),
        "policy_loss": lambda: method.policy_loss(torch.zeros(9), batch, old, Meter()),  # batch: its one microbatch
    }
    with pytest.raises(ValueError, match=message) as caught:
        calls.get(hook, lambda: getattr(method, hook)(batch, groups, 0, Meter()))()
    assert "louder" in str(caught.value)


def test_options_of_any_plain_kind_are_read(methods_folder):
    options = "    factor: float = 2.0\n"
    declared = "    factor: float\n    flags: dict[str, bool] = field(default_factory=dict)\n    pair: {} = (1, 2)\n"
    head = METHOD.format(order=10).replace("import dataclass", "import dataclass, field")
    file = methods_folder / "louder.py"
    file.write_text(head.replace(options, declared.replace("{}", "object")))
    (method,) = build({"louder": {"factor": 2, "flags": {"early": False, "late": True}}}).methods
    assert method.config.flags == {"early": False, "late": True}
    with pytest.raises(ConfigError, match="exploration.louder.flags.late must be of type bool, not 1"):
        build({"louder": {"factor": 2, "flags": {"late": 1}}})
    with pytest.raises(ConfigError, match="exploration.louder.factor has no default: set it"):
        build({"louder": {}})
    sys.modules.pop(f"{exploration.__name__}.louder")
    file.write_text(head.replace(options, declared.replace("{}", "tuple[int, ...]")))
    with pytest.raises(ConfigError, match=r"exploration.louder.pair is declared as tuple\[int, ...\], which no YAML"):
        build({"louder": {"factor": 2, "pair": [1, 2]}})
