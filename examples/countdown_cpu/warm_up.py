"""Supervised warm-up on random right answers, through the policy that reinforcement learning then trains.

It always runs in one process, so that every later run, in whatever layout, starts from the same weights.
"""

from __future__ import annotations

import os
import random
import tempfile
import warnings
from pathlib import Path

import tiny_model  # beside this file
from puzzles import Puzzle
from rich.progress import track
from torch import Tensor

warnings.simplefilter("ignore")  # Megatron lists what a machine without a GPU lacks; platform.py answers for that

from megatron_rlvr import platform  # noqa: E402
from megatron_rlvr.architecture import Architecture  # noqa: E402
from megatron_rlvr.config import Config, ModelConfig, OptimizerConfig, TrainerConfig  # noqa: E402
from megatron_rlvr.distributed import groups as process_groups  # noqa: E402
from megatron_rlvr.distributed.vocab import StatisticsOptions, TokenStatistics  # noqa: E402
from megatron_rlvr.losses import reduction_weights  # noqa: E402
from megatron_rlvr.metrics import Meter  # noqa: E402
from megatron_rlvr.models.build import initialize_parallel  # noqa: E402
from megatron_rlvr.models.policy import Policy  # noqa: E402
from megatron_rlvr.packing import pack  # noqa: E402
from megatron_rlvr.processes import free_port  # noqa: E402
from megatron_rlvr.types import Batch, Microbatch, Prompt, Rollout, RolloutGroup, Update  # noqa: E402
from megatron_rlvr.weights.convert import save_hf  # noqa: E402
from megatron_rlvr.weights.partial_folder import companions  # noqa: E402

UPDATES, PAIRS = 250, 64  # pairs of a puzzle and a right answer per update


def make_model(target: Path, puzzles: list[Puzzle], seed: int) -> float:
    """Random weights, the warm-up, the Hugging Face folder ``target``; returns the last update's loss."""
    _start_alone()
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "random"
        tiny_model.write(start, seed)
        config = _config(start, seed)
        groups = initialize_parallel(config)
        policy = Policy(config, Architecture.from_folder(start), groups)
        loss = _warm_up(policy, _draw_pairs(puzzles, seed))
        save_hf(policy.hf_weights(), companions(start), target)
    process_groups.destroy()
    return loss


def _start_alone() -> None:
    """A process group of one rank, also where this script was started by a rank of many and sees its environment."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # else it looks for torchrun's own store at that address
    platform.start_rank()
    process_groups.init(timeout_seconds=60)


def _config(model: Path, seed: int) -> Config:
    return Config(
        seed=seed,
        model=ModelConfig(path=str(model), dtype="float32"),
        optimizer=OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=20),
        trainer=TrainerConfig(num_steps=UPDATES),
    )


def _draw_pairs(puzzles: list[Puzzle], seed: int) -> Batch:
    """The pairs of every update, as groups of one response each."""
    draw, encode = random.Random(seed), tiny_model.tokenizer().encode
    groups = []
    for puzzle in draw.choices(puzzles, k=UPDATES * PAIRS):
        prompt = Prompt("", puzzle.prompt, tuple(encode(puzzle.prompt)), "countdown", None)
        answer = encode(draw.choice(puzzle.answers) + tiny_model.END)
        groups.append(RolloutGroup(prompt, [Rollout(0, answer, [0.0] * len(answer), "stop", 0)]))
    batch = pack(groups, [[1.0]] * len(groups), updates=UPDATES, microbatch_tokens=PAIRS * 32)
    return batch.to(platform.device())


def _warm_up(policy: Policy, batch: Batch) -> float:
    """One pass over the updates; returns the last one's mean negative log-prob."""
    for update in track(batch.updates, description="warm-up"):

        def loss(micro: Microbatch, current: TokenStatistics, meter: Meter, update: Update = update) -> Tensor:
            return -(reduction_weights(micro, update, "token_mean") * current.log_prob).sum()

        meter = policy.update(batch, update, loss, StatisticsOptions())
    return meter.means()["policy/loss"]
