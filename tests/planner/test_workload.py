"""Parameters, passes and FLOPs against what the package itself holds and does."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config, load_config
from megatron_rlvr.exploration.base import build
from megatron_rlvr.planner.shapes import SHAPES
from megatron_rlvr.planner.workload import Workload, forward_flops, stage_parameters
from megatron_rlvr.weights import mapping
from tests.tiny import make_folder

ROOT = Path(__file__).parents[2]
CONFIGS = [
    path
    for folder in ("lp_reg", "cde")
    for path in (ROOT / "examples" / folder).glob("**/*.yaml")
    if path.stem[0] != "_"
]


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Qwen2.5-3B", "Qwen3-4B-Base", "Qwen3-14B-Base"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_parameters_of_a_stage_are_those_that_weights_are_cut_into(name: str, tp: int, pp: int) -> None:
    architecture = SHAPES[name]
    found = [0] * pp
    for entry in mapping.entries(architecture):
        size = math.prod(mapping.shard_shape(entry, architecture, tp))
        if entry.layer is not None:
            stages = {entry.layer // (architecture.num_layers // pp)}
        elif entry.megatron[0].startswith("embedding."):
            stages = {0, pp - 1} if architecture.tied else {0}  # a tied last stage has a copy
        else:
            stages = {pp - 1}
        for stage in stages:
            found[stage] += size
    planned = [stage_parameters(architecture, tp, pp, stage) for stage in range(pp)]
    assert planned == found


def test_a_critic_has_heads_where_the_policy_has_an_output_layer() -> None:
    untied = dataclasses.replace(SHAPES["Qwen3-4B-Base"], tied=False)
    policy, critic = stage_parameters(untied, 2, 1, 0), stage_parameters(untied, 2, 1, 0, heads=16)
    vocabulary = untied.padded_vocab(2) // 2 * untied.hidden_size
    assert policy - critic == vocabulary - 16 * (untied.hidden_size + 1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_passes_are_those_of_the_trainer(path: Path) -> None:
    config = load_config(path)
    assert planned_passes(config) == passes_of_the_trainer(config)


@pytest.mark.parametrize(
    "exploration",
    [
        {"stapo": {}},
        {"clip_cov": {"scope": "microbatch"}},
        {"high_entropy": {"scope": "microbatch"}},
        {"lp_reg": {"target_share": 0.002}},
        {"lp_reg": {"proxy_source": "reference", "divergence": "k3_sampled"}},
        {"lp_reg": {"proxy_source": "current"}},
        {"lp_reg": {"divergence": None, "proxy_source": None}},
        {"lp_reg": {"proxy_source": "rollout", "divergence": "k3_sampled", "target_share": 0.002}},
        {"sim_hash": {}},
        {"rollout_correction": {"form": "mis", "renormalise": True}},
        {"lp_reg": {}, "cde": {}, "clip_cov": {}},
    ],
)
@pytest.mark.parametrize(
    "override", ["seed=1", "trainer.updates_per_rollout=4", "model.dropout=0.1", "algorithm.kl.coefficient=0.1"]
)
def test_passes_of_methods_with_options(exploration: dict, override: str) -> None:
    config = load_config(ROOT / "examples/lp_reg/qwen3_14b/grpo_on.yaml", [override])
    config.exploration = exploration
    assert planned_passes(config) == passes_of_the_trainer(config)


def planned_passes(config: Config) -> dict[str, bool | int]:
    workload = Workload.of(config)
    return {
        "old policy": workload.old_policy_pass,
        "reference": workload.reference,
        "states": workload.states_pass,
        "old top": workload.old_top,
        "critic": workload.critic is not None,
    }


def passes_of_the_trainer(config: Config) -> dict[str, bool | int]:
    needs = build(config.exploration, config).needs()
    return {
        "old policy": needs.old_statistics or config.learns_from_older,
        "reference": needs.reference or config.algorithm.kl.coefficient > 0,
        "states": bool(needs.states),
        "old top": needs.old_top,
        "critic": config.has_critic,
    }


def test_flops_are_those_that_torch_counts(tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    folder, tokens = make_folder(tmp_path / "model"), 24
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(2, 200, (1, tokens)))
    # Eager attention multiplies the whole square, of which causality needs half.
    planned = forward_flops(Architecture.from_folder(folder), tokens, context=tokens)
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.01)
