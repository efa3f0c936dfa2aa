"""Make the example's data and its starting model: python examples/countdown_cpu/prepare.py [--out FOLDER] [--force]

FOLDER/train.jsonl and eval.jsonl hold the puzzles, FOLDER/model the model after a supervised warm-up of seconds.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import random
import shutil
import sys
from pathlib import Path

from puzzles import Puzzle, all_puzzles  # beside this file

SEED = 0
HELD_OUT = 100


def main() -> int:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Make the countdown puzzles and the model that training starts from.")
    parser.add_argument("--out", type=Path, default=here / "build", help="folder to write (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="make everything anew")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / ".lock", "w") as lock:  # two runs that start at once: the second finds everything there
        fcntl.flock(lock, fcntl.LOCK_EX)
        return make(options)


def make(options: argparse.Namespace) -> int:
    data, model = [options.out / "train.jsonl", options.out / "eval.jsonl"], options.out / "model"
    if all(path.exists() for path in [*data, model]) and not options.force:
        print(f"{options.out} is there already; --force makes it anew")
        return 0
    shutil.rmtree(model, ignore_errors=True)  # made last and whole or not at all: where it is, everything is
    train, held_out = split(all_puzzles())
    for path, puzzles in zip(data, (train, held_out), strict=True):
        path.write_text("".join(json.dumps(puzzle.row()) + "\n" for puzzle in puzzles))
    print(f"{len(train)} puzzles to train on, {len(held_out)} held out; warming the model up", flush=True)
    from warm_up import make_model  # brings Megatron, which takes seconds

    loss = make_model(model, train, SEED)
    print(f"{options.out} holds data and model; loss after the warm-up: {loss:.2f} nats per token")
    return 0


def split(puzzles: list[Puzzle]) -> tuple[list[Puzzle], list[Puzzle]]:
    """(train, held out), the same for everybody."""
    held_out = set(random.Random(SEED).sample(range(len(puzzles)), HELD_OUT))
    return (
        [puzzle for index, puzzle in enumerate(puzzles) if index not in held_out],
        [puzzle for index, puzzle in enumerate(puzzles) if index in held_out],
    )


if __name__ == "__main__":
    sys.exit(main())
