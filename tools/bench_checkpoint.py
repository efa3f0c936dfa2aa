"""What a checkpoint costs a run: python tools/bench_checkpoint.py [--layers 8 --hidden 1024 --tp 1 --tokens 2048 ...]

A random Qwen3-shaped policy with its optimizer takes updates of ``--tokens`` tokens, alone and while a checkpoint is
being written. One JSON line per save: seconds that the run stood still, also as a share of an update; seconds until the
checkpoint was whole; MiB/s of both ways; the same of a plain copy of the same files, synced. The last line holds the
medians. An RL step also samples and judges, so a stall's share of it is smaller than of an update.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import bench_ranks
from bench_weight_sync import shape


def main() -> int:
    sizes = {"layers": 8, "hidden": 1024, "ffn": 3072, "vocab": 32768, "tp": 1, "tokens": 2048, "saves": 3}
    return bench_ranks.on_ranks(bench, bench_ranks.parser(__doc__, "float32", **sizes).parse_args())


def bench(options: argparse.Namespace) -> None:
    from megatron_rlvr.distributed import reduce
    from megatron_rlvr.distributed.groups import ParallelGroups
    from megatron_rlvr.models.build import initialize_parallel
    from megatron_rlvr.weights.initial import write_initial

    config = make_config(options)
    groups: ParallelGroups = initialize_parallel(config)
    folder = Path(reduce.broadcast_object(tempfile.mkdtemp() if groups.rank == 0 else "", 0, groups.world))
    try:
        if groups.rank == 0:
            (folder / "shape").mkdir()
            (folder / "shape/config.json").write_text(json.dumps(shape(options)))
            write_initial(folder / "shape", folder / "model", 0)
        reduce.gather_objects(None, groups.world)
        config.model.path = str(folder / "model")
        measure(folder, config, groups, options)
    finally:
        if groups.rank == 0:
            shutil.rmtree(folder)


def make_config(options: argparse.Namespace) -> Any:
    from megatron_rlvr.config import Config, ModelConfig, ParallelConfig, TrainerConfig

    return Config(
        model=ModelConfig(dtype=options.dtype),
        parallel=ParallelConfig(tp=options.tp),
        trainer=TrainerConfig(microbatch_tokens=options.tokens),
    )


def measure(folder: Path, config: Any, groups: Any, options: argparse.Namespace) -> None:
    from megatron_rlvr.architecture import Architecture
    from megatron_rlvr.models.checkpoint import load, newest_usable
    from megatron_rlvr.models.checkpoint_writer import CheckpointWriter
    from megatron_rlvr.models.policy import Policy

    policy = Policy(config, Architecture.from_folder(config.model.path), groups)
    models, update = {"policy": policy}, make_update(policy, options.tokens)
    writer = CheckpointWriter(folder, config, models, groups)
    update()
    rows = []
    for step in range(1, options.saves + 1):
        alone = seconds(update)
        writer.save({"step": step})
        assert writer.wait() == ""
        quiet = writer.stalled + writer.written
        writer.save({"step": step})
        beside = []
        while writer.busy:
            beside.append(seconds(update))
        assert writer.wait() == ""
        check = seconds(partial(newest_usable, folder, models, groups))
        path = folder / "checkpoints" / f"step_{step}"
        read = seconds(partial(load, path, models, groups))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**20
        copy = seconds(partial(plain_copy, path, folder / "copy"))
        row = {
            "mib": round(size, 1),
            "update_seconds": round(alone, 4),
            "stall_seconds": round(writer.stalled, 4),
            "stall_share": round(writer.stalled / alone, 4),
            "update_beside_ratio": round(median(beside) / alone, 3) if beside else 1.0,
            "save_mib_per_second": round(size / quiet, 1),
            "save_beside_mib_per_second": round(size / (writer.stalled + writer.written), 1),
            "check_and_load_mib_per_second": round(size / (check + read), 1),
            "load_mib_per_second": round(size / read, 1),
            "copy_mib_per_second": round(size / copy, 1),
        }
        rows.append(row)
        if groups.rank == 0:
            print(json.dumps(row), flush=True)
    if groups.rank == 0:
        print(json.dumps({"tp": options.tp} | {name: median(row[name] for row in rows) for name in rows[0]}))


def make_update(policy: Any, tokens: int) -> Callable[[], Any]:
    """One optimizer update over ``tokens`` random tokens in responses of 128."""
    import random

    from megatron_rlvr.distributed.vocab import StatisticsOptions
    from megatron_rlvr.packing import pack
    from megatron_rlvr.types import Prompt, Rollout, RolloutGroup

    draw, size = random.Random(0), policy.architecture.vocab_size

    def rollout(index: int) -> Any:
        return Rollout(index, [draw.randrange(size) for _ in range(120)], [-1.0] * 120, "stop", policy_version=0)

    prompt = Prompt("bench/1", "", tuple(range(8)), "bench", None)
    groups = [RolloutGroup(prompt, [rollout(index)]) for index in range(max(1, tokens // 128))]
    rewards: list[list[float | None]] = [[1.0] for _ in groups]
    batch = pack(groups, rewards, updates=1, microbatch_tokens=tokens, dp_rank=0, dp_size=1, microbatch_multiple=1)

    def loss(micro: Any, statistics: Any, meter: Any) -> Any:
        return -statistics.log_prob[micro.loss_mask].sum() / tokens

    return lambda: policy.update(batch, batch.updates[0], loss, StatisticsOptions(1.0))


def plain_copy(source: Path, target: Path) -> None:
    """The same bytes, by the operating system, until they are on the disk."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    for file in target.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())


def seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
