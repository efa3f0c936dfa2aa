"""What the flight recorder costs: python tools/bench_recorder.py [--steps 20] [key=value ...]

First a real run of the countdown example on one rank, with the time of every call of the recorder and its writer held
against the time of the steps. Then the largest record there can be, 32,768 tokens in 8 microbatches with the columns of
Lp-Reg and CDE, and its page. One JSON line each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megatron_rlvr import train
from megatron_rlvr.config import load_config
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.vocab import TokenStatistics
from megatron_rlvr.launch.local import run_ranks
from megatron_rlvr.packing import pack
from megatron_rlvr.recorder import FlightRecorder
from megatron_rlvr.records import read_rows
from megatron_rlvr.rollout_page import build_rollout_page
from megatron_rlvr.token_records import MOST_TOKENS, TokenWriter, read_record, record_path, recorded_steps
from megatron_rlvr.types import Prompt, Rollout, RolloutGroup
from megatron_rlvr.verdict import Verdict

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "examples/countdown_cpu/config.yaml"
SKIPPED = 5  # steps of warming up, not counted
CALLS = ((FlightRecorder, "start"), (FlightRecorder, "old_policy"), (FlightRecorder, "loss"))
CALLS += ((FlightRecorder, "collect"), (TokenWriter, "write"))
RESPONSES, EXTRAS = 8, ("lp_reg/proxy_log_prob", "lp_reg/log_kept_mass", "cde/bonus", "cde/critic_bonus")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="measured steps (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=MOST_TOKENS, help="of the largest record (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the countdown config")
    options = parser.parse_args()
    if "RANK" in os.environ:
        return real_run(options)
    os.chdir(ROOT)
    code = run_ranks([sys.executable, *sys.argv], 1, 0, {})
    if not code:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(largest_record(Path(folder), options.tokens)), flush=True)
    return code


def real_run(options: argparse.Namespace) -> int:
    """One rank's run with a clock on the recorder; prints its line."""
    terminal, spent = os.fdopen(os.dup(1), "w"), []
    for owner, name in CALLS:
        setattr(owner, name, timed(getattr(owner, name), spent))
    with tempfile.TemporaryDirectory() as folder:
        settings = ["parallel.tp=1", "data.eval_path=", "logging.tensorboard=false", f"run.dir={folder}/run"]
        settings += [f"trainer.num_steps={options.steps + SKIPPED}"]
        code = train.be_rank(load_config(CONFIG, [*settings, *options.overrides]))
        if code:
            return code
        run = Path(folder) / "run"
        rows = read_rows(run / "metrics.jsonl")[SKIPPED:]
        per_step = sum(spent[len(spent) * SKIPPED // (options.steps + SKIPPED) :]) / len(rows)
        sizes = [record_path(run, step).stat().st_size for step in recorded_steps(run)]
        columns = read_record(run, 1).columns
    step = median(row["time/step"] for row in rows)
    line = {"case": "countdown", "steps": len(rows), "step_seconds": step, "recorder_seconds": per_step}
    line |= {"overhead": per_step / step, "columns": len(columns), "file_bytes": median(sizes)}
    print(json.dumps(line), file=terminal, flush=True)
    return 0


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
    recorder, writer = FlightRecorder(RESPONSES, ParallelGroups.single()), TokenWriter(folder, str)
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
