"""What the flight recorder costs: python tools/bench_recorder.py [--steps 20]

First the countdown example's training on one rank, without the rollouts: old policy's pass, Lp-Reg, four updates of 64
responses, and every call of the recorder and its writer held against that time. A whole step takes longer, so the share
of it is smaller. Then the largest record there can be, 32,768 tokens in 8 microbatches with the columns of Lp-Reg and
CDE, and its page. One JSON line each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_ranks import on_ranks
from torch import Tensor

from megatron_rlvr import preflight
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config, load_config
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.vocab import TokenStatistics
from megatron_rlvr.exploration.base import Exploration, build
from megatron_rlvr.losses import Clip, clipped_surrogate, reduction_weights
from megatron_rlvr.metrics import Meter
from megatron_rlvr.packing import pack
from megatron_rlvr.pages.rollout_page import build_rollout_page
from megatron_rlvr.recorder import FlightRecorder
from megatron_rlvr.token_records import MOST_TOKENS, TokenWriter, record_path
from megatron_rlvr.types import Microbatch, Prompt, Rollout, RolloutGroup, Update
from megatron_rlvr.verdict import Verdict

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "examples/countdown_cpu/config.yaml"
SKIPPED = 3  # steps of warming up, not counted
CALLS: list[tuple[type, str]] = [(FlightRecorder, name) for name in ("start", "old_policy", "loss", "collect")]
CALLS += [(TokenWriter, "write")]
RESPONSES, EXTRAS = 8, ("lp_reg/proxy_log_prob", "lp_reg/log_kept_mass", "cde/bonus", "cde/critic_bonus")
PROMPT_TOKENS, RESPONSE_TOKENS = 9, 6  # of countdown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="measured steps (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=MOST_TOKENS, help="of the largest record (default: %(default)s)")
    parser.set_defaults(tp=1)
    options = parser.parse_args()
    os.chdir(ROOT)
    return on_ranks(measure, options)


def measure(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(training(Path(folder), options.steps)), flush=True)
        print(json.dumps(largest_record(Path(folder), options.tokens)), flush=True)


def training(folder: Path, steps: int) -> dict[str, Any]:
    """Steps of the countdown example from invented rollouts, with a clock on every call of the recorder."""
    from megatron_rlvr.models.build import initialize_parallel
    from megatron_rlvr.models.policy import Policy

    config = load_config(CONFIG, ["parallel.tp=1", f"run.dir={folder}/run"])
    preflight.prepare(config)
    groups = initialize_parallel(config)
    architecture = Architecture.from_folder(config.model.path)
    policy, method = Policy(config, architecture, groups), build(config.exploration, config)
    statistics = method.needs().statistics(config.rollout.temperature)
    recorder, writer = FlightRecorder(config.logging.record_responses, True, groups), TokenWriter(folder, str)
    calls: list[float] = []
    for owner, name in CALLS:
        setattr(owner, name, timed(getattr(owner, name), calls))
    shares, seconds, spent = [], [], []
    for step in range(steps + SKIPPED):
        rollouts = invented(config, architecture.vocab_size, step)
        rewards: list[list[float | None]] = [[item.verdict.reward for item in group.rollouts] for group in rollouts]
        calls.clear()
        started = time.perf_counter()
        batch = pack(
            rollouts,
            rewards,
            updates=config.trainer.updates_per_rollout,
            microbatch_tokens=config.trainer.microbatch_tokens,
        )
        recorder.start(batch, rollouts)
        old = policy.fill_log_probs(batch, statistics)
        batch.extras.update(method.annotate(batch, old))
        recorder.old_policy(batch, old)
        batch.advantages = batch.per_token(batch.rewards - batch.rewards.mean())
        for update in batch.updates:
            method.prepare_update(batch, update, groups)
            policy.update(batch, update, partial(loss, config, method, recorder, update), statistics)
        recording = recorder.collect(batch)
        writer.write(step, recording)
        seconds.append(time.perf_counter() - started)
        spent.append(sum(calls))
        shares.append(spent[-1] / seconds[-1])
    line = {"case": "countdown", "steps": steps, "training_seconds": median(seconds[SKIPPED:])}
    line |= {"recorder_seconds": median(spent[SKIPPED:]), "overhead": median(shares[SKIPPED:])}
    return line | {"columns": len(recording.columns), "file_bytes": record_path(folder, steps).stat().st_size}


def loss(
    config: Config,
    method: Exploration,
    recorder: FlightRecorder,
    update: Update,
    micro: Microbatch,
    current: TokenStatistics,
    meter: Meter,
) -> Tensor:
    clip = Clip(config.algorithm.clip_low, config.algorithm.clip_high)
    losses, clipped = clipped_surrogate(current.log_prob, micro, clip)
    losses = method.policy_loss(losses, micro, current, meter)
    recorder.loss(micro, current, clipped)
    return torch.where(micro.loss_mask, reduction_weights(micro, update, "token_mean") * losses, 0.0).sum()


def invented(config: Config, vocabulary: int, seed: int) -> list[RolloutGroup]:
    """Random tokens and rewards, as many as a step of countdown has."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(count)]

    def rollout(sample: int) -> Rollout:
        verdict = Verdict(float(draw.random() < 0.2), "ok")
        return Rollout(sample, tokens(RESPONSE_TOKENS), [-1.0] * RESPONSE_TOKENS, "stop", 0, "5*7+3", verdict)

    return [
        RolloutGroup(
            Prompt(str(place), "3,5,7=38>", tuple(tokens(PROMPT_TOKENS)), "countdown", None),
            [rollout(sample) for sample in range(config.rollout.responses_per_prompt)],
        )
        for place in range(config.rollout.prompts_per_step)
    ]


def timed(call: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def clocked(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = call(*arguments)
        spent.append(time.perf_counter() - started)
        return result

    return clocked


def largest_record(folder: Path, tokens: int) -> dict[str, Any]:
    """A step's worth of recording at the bound: one response a microbatch, each token its own text."""
    length = tokens // RESPONSES
    groups = [
        RolloutGroup(
            Prompt(str(place), "", (1,), "toy", None),
            [Rollout(0, list(range(length)), [-1.0] * length, "stop", 0, "x" * 4 * length, Verdict(1.0, "ok"))],
        )
        for place in range(RESPONSES)
    ]
    batch = pack(groups, [[1.0]] * RESPONSES, updates=1, microbatch_tokens=length + 1)
    values = torch.randn(batch.num_tokens)
    batch.old_log_probs = batch.entropy = batch.advantages = values
    batch.values = values[:, None].expand(-1, 4)
    batch.extras = {name: values for name in EXTRAS}
    recorder, writer = FlightRecorder(RESPONSES, True, ParallelGroups.single()), TokenWriter(folder, str)
    started = time.perf_counter()
    recorder.start(batch, groups)
    recorder.old_policy(batch, TokenStatistics(*[values] * 7))
    for micro in batch.microbatches():
        now = TokenStatistics(*[micro.old_log_probs] * 7)
        micro.extras["lp_reg/selected"] = micro.loss_mask
        recorder.loss(micro, now, micro.loss_mask)
    recording = recorder.collect(batch)
    gathered = time.perf_counter()
    writer.write(1, recording)
    written = time.perf_counter()
    page = build_rollout_page(folder, 1).stat().st_size
    size, columns = record_path(folder, 1).stat().st_size, len(recording.columns)
    line = {"case": "largest", "tokens": length * RESPONSES, "columns": columns, "record_seconds": gathered - started}
    return line | {"write_seconds": written - gathered, "file_bytes": size, "page_bytes": page}


if __name__ == "__main__":
    sys.exit(main())
