"""What a method adds to a step: python tools/bench_exploration.py [--updates 1 --tp 2 --vocab 32768 ...]

The trainer's own step, without its engine: responses of random tokens, a random Qwen3-shaped policy, learning rates of
almost 0 so that every step costs the same. Five variants over the same responses: GRPO, Lp-Reg over it (``paper`` and
``released_code``), PPO with one value head and with sixteen. With ``--updates`` above 1 all of them make the pass of
the old policy, with 1 none does.

One JSON line a variant: wall and CPU seconds of a step and the policy's forward passes over a microbatch in it, medians
over ``--rounds`` interleaved rounds after one that compiles. The last line holds the ratios, each the median over
rounds of the CPU seconds (on a GPU the wall seconds) of two steps of one round. The policy is small for its vocabulary,
over which Lp-Reg's statistics are taken: in a large model they are a smaller share.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import bench_ranks
from bench_weight_sync import shape

STILL = {"lr": 1e-30, "distributed": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "lp_reg": {"exploration": {"lp_reg": {}}},
    "lp_reg_released_code": {"exploration": {"lp_reg": {"preset": "released_code"}}},
    "ppo_1_head": {"algorithm": {"advantage": "gae"}, "critic": {"num_heads": 1, "optimizer": STILL}},
    "ppo_16_heads": {"algorithm": {"advantage": "gae"}, "critic": {"num_heads": 16, "optimizer": STILL}},
}
RATIOS = [("lp_reg", "grpo"), ("lp_reg_released_code", "grpo"), ("ppo_16_heads", "ppo_1_head")]


def main() -> int:
    sizes = dict(layers=12, hidden=512, ffn=1536, vocab=151_936, tp=1, updates=2, rounds=7)
    parser = bench_ranks.parser(__doc__, "float32", **sizes, prompts=4, responses=4, length=8, microbatch_tokens=128)
    return bench_ranks.on_ranks(bench, parser.parse_args())


def bench(options: argparse.Namespace) -> None:
    from megatron_rlvr import platform

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape(options) | {"tie_word_embeddings": True}))
        variants, groups = build(folder, options)
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
        for number in range(options.rounds + 1):
            for name, variant in variants.items():
                row = measure(variant, number + 1)
                if number:  # the first one compiles
                    rows[name].append(row)
    if groups.rank:
        return
    clock = "cpu_seconds" if platform.device().type == "cpu" else "seconds"
    for name, found in rows.items():
        print(json.dumps({"variant": name, **{key: round(median(row[key] for row in found), 4) for key in found[0]}}))
    ratios = {
        f"{above} / {below}": [a[clock] / b[clock] for a, b in zip(rows[above], rows[below], strict=True)]
        for above, below in RATIOS
    }
    print(json.dumps(vars(options) | {name: round(median(values), 4) for name, values in ratios.items()}))


def build(folder: str, options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """(variant -> its trainer, the process groups); all of them share one policy and one step's responses."""
    from megatron_rlvr.architecture import Architecture
    from megatron_rlvr.config import Config, from_dict
    from megatron_rlvr.exploration.base import build as build_exploration
    from megatron_rlvr.models.build import initialize_parallel
    from megatron_rlvr.models.critic import Critic
    from megatron_rlvr.models.policy import Policy
    from megatron_rlvr.recorder import FlightRecorder
    from megatron_rlvr.rollout.enough import Sampled
    from megatron_rlvr.trainer import Trainer
    from megatron_rlvr.weights.initial import write_initial

    class WithoutEngine(Trainer):
        """Everything of a step but sampling and weight sync."""

        def __init__(self, config: Config) -> None:
            self.config, self.groups, self.policy, self.policy_version = config, groups, policy, 0
            self.exploration = build_exploration(config.exploration, config)
            self.statistics = self.exploration.needs().statistics(config.rollout.temperature)
            self.states, self.old_policy_pass = "", config.trainer.updates_per_rollout > 1
            self.critic = Critic(config, groups) if config.has_critic else None
            self.reference, self.recorder, self.on_phase = None, FlightRecorder(0, False, groups), lambda *said: None

        def rollout(self, step: int) -> Sampled:
            return Sampled(responses, responses, generations=1)

        def push_weights(self) -> Any:
            return SimpleNamespace(metrics=dict)

    write_initial(folder, f"{folder}/model", seed=0)
    configs = {name: from_dict(Config, settings(f"{folder}/model", options) | own) for name, own in VARIANTS.items()}
    groups = initialize_parallel(configs["grpo"])
    policy = Policy(configs["grpo"], Architecture.from_folder(folder), groups)
    responses = random_responses(options)
    return {name: WithoutEngine(config) for name, config in configs.items()}, groups


def settings(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """The sections of the config that all variants share."""
    return {
        "model": {"path": model, "dtype": options.dtype},
        "parallel": {"tp": options.tp},
        "rollout": {"prompts_per_step": options.prompts, "responses_per_prompt": options.responses},
        "trainer": {"updates_per_rollout": options.updates, "microbatch_tokens": options.microbatch_tokens},
        "optimizer": STILL,
    }


def random_responses(options: argparse.Namespace) -> list:
    """Groups of random tokens, prompts as long as responses, half of the responses right."""
    from megatron_rlvr.types import Prompt, Rollout, RolloutGroup
    from megatron_rlvr.verdict import Verdict

    draw = random.Random(0)

    def tokens() -> list[int]:
        return [draw.randrange(options.vocab) for _ in range(options.length)]

    def rollout(index: int) -> Rollout:
        log_probs = [-draw.expovariate(0.1) for _ in range(options.length)]
        return Rollout(index, tokens(), log_probs, "stop", 0, verdict=Verdict(float(index % 2), "ok"))

    return [
        RolloutGroup(Prompt(str(row), "", tuple(tokens()), "", None), [rollout(i) for i in range(options.responses)])
        for row in range(options.prompts)
    ]


def measure(trainer: Any, step: int) -> dict[str, float]:
    """One step: its wall and CPU seconds on this rank, and how often the policy's first chunk was run forward."""
    passes = []
    hook = trainer.policy.chunks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    started, cpu = time.perf_counter(), time.process_time()
    trainer.step(step)
    row = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    hook.remove()
    return row | {"policy_forwards": len(passes)}


if __name__ == "__main__":
    sys.exit(main())
