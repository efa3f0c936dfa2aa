"""Make the example's data and its starting model: python examples/countdown_cpu/prepare.py [--out FOLDER] [--force]

FOLDER/train.jsonl and eval.jsonl hold the puzzles, FOLDER/model the model after a supervised warm-up of seconds.
The warm-up always runs in one process, so that every later run, in whatever layout, starts from the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import tiny_model  # beside this file
from puzzles import Puzzle, all_puzzles
from rich.progress import track
from torch import Tensor

from megatron_rlvr import platform
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config, ModelConfig, OptimizerConfig, TrainerConfig
from megatron_rlvr.distributed import groups as process_groups
from megatron_rlvr.distributed.vocab import StatisticsOptions, TokenStatistics
from megatron_rlvr.losses import token_mean
from megatron_rlvr.metrics import Meter
from megatron_rlvr.models.build import initialize_parallel
from megatron_rlvr.models.policy import Policy
from megatron_rlvr.packing import pack
from megatron_rlvr.processes import free_port
from megatron_rlvr.types import Batch, Microbatch, Prompt, Rollout, RolloutGroup, Update
from megatron_rlvr.weights.convert import save_hf

SEED = 0
HELD_OUT = 100
UPDATES, PAIRS = 200, 128  # of the warm-up; pairs of puzzle and right answer per update


def main() -> int:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Make the countdown puzzles and the model that reinforcement learning starts from.")
    parser.add_argument("--out", type=Path, default=here / "build", help="folder to write (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="make everything anew")
    options = parser.parse_args()
    files = [options.out / name for name in ("train.jsonl", "eval.jsonl", "model/model.safetensors")]
    if all(file.is_file() for file in files) and not options.force:
        print(f"{options.out} is there already; --force makes it anew")
        return 0
    train, held_out = split(all_puzzles())
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.out / "model", ignore_errors=True)  # it comes last, so a model means that all is there
    for path, puzzles in zip(files[:2], (train, held_out), strict=True):
        path.write_text("".join(json.dumps(puzzle.row()) + "\n" for puzzle in puzzles))
    print(f"{len(train)} puzzles to train on, {len(held_out)} held out; warming the model up")
    loss = make_model(options.out / "model", train)
    print(f"{options.out}: model and data, loss {loss:.2f} nats per token after the warm-up")
    return 0


def split(puzzles: list[Puzzle]) -> tuple[list[Puzzle], list[Puzzle]]:
    """(train, held out), the same for everybody."""
    held_out = set(random.Random(SEED).sample(range(len(puzzles)), HELD_OUT))
    return (
        [puzzle for index, puzzle in enumerate(puzzles) if index not in held_out],
        [puzzle for index, puzzle in enumerate(puzzles) if index in held_out],
    )


def make_model(target: Path, puzzles: list[Puzzle]) -> float:
    """Random weights, the warm-up, the Hugging Face folder; returns the last update's loss."""
    # A run of its own of one rank, also where a launcher that started this script has set these for its ranks.
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.update(rank | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
    platform.start_rank()
    process_groups.init(platform.backend(), timeout_seconds=60)
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "random"
        tiny_model.write(start, SEED)
        config = warm_up_config(start)
        groups = initialize_parallel(config)
        policy = Policy(config, Architecture.from_folder(start), groups)
        loss = warm_up(policy, batch_of_pairs(puzzles))
        save_hf(policy.hf_weights(), start, target)
    process_groups.destroy()
    return loss


def warm_up_config(model: Path) -> Config:
    """One rank, float32, whatever the run's own configuration says."""
    return Config(
        seed=SEED,
        model=ModelConfig(path=str(model), dtype="float32"),
        optimizer=OptimizerConfig(lr=3e-3, schedule="cosine", warmup_steps=20),
        trainer=TrainerConfig(num_steps=UPDATES),
    )


def batch_of_pairs(puzzles: list[Puzzle]) -> Batch:
    """The pairs of every update, drawn at random, as groups of one response each."""
    draw, encode = random.Random(SEED), tiny_model.tokenizer().encode
    pairs = []
    for puzzle in draw.choices(puzzles, k=UPDATES * PAIRS):
        prompt = Prompt("", puzzle.prompt, tuple(encode(puzzle.prompt)), "countdown", None)
        answer = encode(draw.choice(puzzle.answers) + tiny_model.END)
        pairs.append(RolloutGroup(prompt, [Rollout(0, answer, [0.0] * len(answer), "stop", 0)]))
    batch = pack(pairs, [[1.0]] * len(pairs), updates=UPDATES, microbatch_tokens=PAIRS * 32)
    return batch.to(platform.device())


def warm_up(policy: Policy, batch: Batch) -> float:
    """Every update once; returns the last one's mean negative log-prob."""
    for update in track(batch.updates, description="warm-up"):

        def loss(micro: Microbatch, current: TokenStatistics, meter: Meter, update: Update = update) -> Tensor:
            return -(token_mean(micro, update) * current.log_prob).sum()

        meter = policy.update(batch, update, loss, StatisticsOptions())
    return meter.means()["policy/loss"]


if __name__ == "__main__":
    sys.exit(main())
