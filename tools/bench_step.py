"""Steps per second on the countdown example, beside TRL's GRPOTrainer where it is installed: python tools/bench_step.py

One step is 16 prompts x 16 samples of up to 7 tokens and the config's number of updates, here and there: plain GRPO
(token mean, clip 0.2), AdamW, float32, the same model folder, prompts and reward. Ours runs as the config lays it out,
TRL in one process with transformers generation, once with one thread and once with a thread per core, since which is
faster depends on what else the machine does. Runs alternate, so that a busy machine slows all. Each prints one JSON
line; the last line holds the medians, and the ratio of ours to the faster TRL.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "examples/countdown_cpu/config.yaml"
SKIPPED = 5  # steps of warming up, not measured
DEADLINE = 900.0  # seconds per run
POLL = 0.02
PHASES = ("generate", "verify", "log_probs", "train", "sync")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="measured steps per run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each implementation (default: %(default)s)")
    parser.add_argument(
        "--trl-python", default=sys.executable, help="interpreter that can import trl (default: this one)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of the config, which both sides read"
    )
    options = parser.parse_args()
    implementations = {"ours": ours}
    if has_trl(options.trl_python):
        implementations |= {
            f"trl_{threads}_threads": partial(trl, threads) for threads in sorted({1, os.cpu_count() or 1})
        }
    else:
        print(f"{options.trl_python} has no trl: measuring ours alone (make bench installs it)", file=sys.stderr)
    rates: dict[str, list[float]] = {name: [] for name in implementations}
    for number in range(1, options.rounds + 1):
        for name, implementation in implementations.items():
            with tempfile.TemporaryDirectory() as folder:
                figures = implementation(Path(folder), options)
            rates[name].append(figures["steps_per_second"])
            print(json.dumps({"implementation": name, "round": number, **figures}), flush=True)
    print(json.dumps(summarise(rates)))
    return 0


def summarise(rates: dict[str, list[float]]) -> dict[str, float]:
    """implementation -> steps per second of its runs: the medians, and how many times the faster TRL ours are."""
    medians = {name: median(values) for name, values in rates.items()}
    theirs = [value for name, value in medians.items() if name != "ours"]
    ratio = {"ratio": round(medians["ours"] / max(theirs), 3)} if theirs else {}
    return {f"{name}_steps_per_second": round(value, 4) for name, value in medians.items()} | ratio


def has_trl(python: str) -> bool:
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('trl') is None)"
    return subprocess.run([python, "-c", check], check=False).returncode == 0


def ours(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run of the trainer, without evaluation and with the algorithm that TRL runs too."""
    run = folder / "run"
    settings = [
        *("exploration={}", "algorithm.loss=ppo", "algorithm.clip_low=0.2", "algorithm.clip_high=0.2"),
        *("trainer.eval_every=0", "data.eval_path=''", "logging.tensorboard=false", "trainer.log_rollouts=0"),
        *(f"trainer.num_steps={SKIPPED + options.steps}", f"run.dir={run}", *options.overrides),
    ]
    command = [sys.executable, "-m", "megatron_rlvr.train", str(CONFIG), *settings]
    figures, rows = measure(command, run / "metrics.jsonl", options.steps, threads=1)
    total = sum(row["time/step"] for row in rows)
    shares = {phase: round(sum(row.get(f"time/{phase}", 0.0) for row in rows) / total, 4) for phase in PHASES}
    return figures | {"phases": shares | {"other": round(1 - sum(shares.values()), 4)}}


def trl(threads: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run of TRL's trainer in its own interpreter, which runs ``train_with_trl`` of this file."""
    marks = folder / "steps.jsonl"
    arguments = f"{str(folder)!r}, {str(marks)!r}, {SKIPPED + options.steps}, {options.overrides!r}"
    code = f"import bench_step; bench_step.train_with_trl({arguments})"
    figures, _ = measure([options.trl_python, "-W", "ignore", "-c", code], marks, options.steps, threads)
    return figures


def measure(command: list[str], marks: Path, steps: int, threads: int) -> tuple[dict[str, Any], list[dict]]:
    """Run ``command``, which appends a JSON line to ``marks`` after each step -> figures, last lines.

    Raises RuntimeError with the end of its output when it fails, TimeoutError after DEADLINE seconds.
    """
    paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)}
    log = marks.parent.with_suffix(".log")
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            start = wait_for_lines(process, marks, SKIPPED, log)
            end = wait_for_lines(process, marks, SKIPPED + steps, log)
            process.wait(DEADLINE)
        finally:
            process.terminate()  # our launcher ends its ranks with it; a process that has ended does not mind
            process.wait(DEADLINE)
            log.unlink()
    wall, cpu = (last - first for first, last in zip(start, end, strict=True))
    figures = {
        "steps": steps,
        "steps_per_second": round(steps / wall, 4),
        "cpu_seconds_per_step": round(cpu / steps, 3),
    }
    return figures, [json.loads(line) for line in marks.read_text().splitlines()[SKIPPED:]]


def wait_for_lines(process: subprocess.Popen, marks: Path, count: int, log: Path) -> tuple[float, float]:
    """(wall clock, CPU seconds of the process and all it started) when the ``count``-th line is there."""
    deadline = time.monotonic() + DEADLINE
    while not marks.exists() or marks.read_bytes().count(b"\n") < count:
        if process.poll() is not None:
            raise RuntimeError(
                f"ended with exit code {process.returncode} before step {count}:\n{log.read_text()[-3000:]}"
            )
        if time.monotonic() > deadline:
            raise TimeoutError(f"no step {count} after {DEADLINE:.0f} s:\n{log.read_text()[-3000:]}")
        time.sleep(POLL)
    return time.monotonic(), cpu_seconds(process.pid)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its descendants, from /proc (Linux)."""
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # the name before it may hold spaces
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        number = int(stat.parent.name)
        parents[number], ticks[number] = int(fields[1]), sum(map(int, fields[11:15]))
    family, grown = {pid}, True
    while grown:
        children = {child for child, parent in parents.items() if parent in family} - family
        family, grown = family | children, bool(children)
    return sum(ticks.get(member, 0) for member in family) / os.sysconf("SC_CLK_TCK")


def train_with_trl(folder: str, marks: str, steps: int, overrides: Sequence[str] = ()) -> None:
    """TRL's side, in its own interpreter: same model, prompts, reward and batch sizes; a line in ``marks`` per step."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from megatron_rlvr.config import load_config
    from megatron_rlvr.verifiers.countdown import verify

    config = load_config(CONFIG, list(overrides))
    rollout, updates = config.rollout, config.trainer.updates_per_rollout

    class Mark(TrainerCallback):
        def on_step_end(self, args, state, control, **unused):
            if state.global_step % updates == 0:
                with open(marks, "a") as file:
                    file.write(json.dumps({"step": state.global_step // updates}) + "\n")

    def reward(completions, answer, **unused):
        return [verify(text, right).reward for text, right in zip(completions, answer, strict=True)]

    settings = GRPOConfig(
        output_dir=folder,
        max_steps=steps * updates,
        per_device_train_batch_size=rollout.prompts_per_step * rollout.responses_per_prompt // updates,
        steps_per_generation=updates,
        num_generations=rollout.responses_per_prompt,
        max_completion_length=rollout.max_response_length,
        learning_rate=config.optimizer.lr,
        warmup_steps=config.optimizer.warmup_steps,
        lr_scheduler_type="constant_with_warmup",
        max_grad_norm=config.optimizer.clip_grad,
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # its default only costs time on a model of this size
        report_to="none",
        save_strategy="no",
        logging_steps=updates,
        disable_tqdm=True,
        seed=config.seed,
    )
    GRPOTrainer(
        model=str(ROOT / config.model.path),
        reward_funcs=reward,
        args=settings,
        train_dataset=load_dataset("json", data_files=str(ROOT / config.data.path), split="train"),
        processing_class=AutoTokenizer.from_pretrained(ROOT / config.model.path),
        callbacks=[Mark()],
    ).train()


if __name__ == "__main__":
    sys.exit(main())
