"""NeMo-Run's experiment through a real Slurm: its tasks in their order, and a run that goes on after it was stopped."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest

from megatron_rlvr.config import as_yaml, load_config
from tests.integration.conftest import metrics
from tests.launch.launcher import DEADLINE, ROOT, launch, needs_launcher
from tests.slurm.conftest import Cluster

pytestmark = [pytest.mark.slurm, needs_launcher]

TASKS = ("convert", "train", "evaluate", "report")
EVALUATION = ["--verifier", "countdown", "--template", "raw", "--max-tokens", "7", "--kv-cache-mib", "64"]
CONFIG = "examples/countdown_cpu/config.yaml"
HERE = {"account": "me", "nodes": "2", "gpus_per_node": "null", "exclusive": "null", "mem": "null", "time": "00:30:00"}


def submit(cluster: Cluster, home: Path, overrides: list[str], *arguments: str) -> dict[str, str]:
    """Task name -> job number."""
    executor = ["--executor", "slurm", *(f"run.executor.{key}={value}" for key, value in HERE.items())]
    quoted = ",".join(f'"{override}"' for override in overrides)
    arguments = (*arguments, f"config={CONFIG}", f"python={sys.executable}", "plan=false", f"overrides=[{quoted}]")
    launch(home, *executor, "--detach", *arguments, SLURM_CONF=str(cluster.folder / "slurm.conf"))
    jobs = cluster.shell("scontrol -o show job")
    return {name: number for number, name in re.findall(r"JobId=(\d+) JobName=me-me\.(\w+)", jobs)}


def test_convert_train_evaluate_report(cluster: Cluster, countdown: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = ["trainer.num_steps=2", "data.eval_path=", f"run.dir={folder}"]
    problems = tmp_path / "eval.jsonl"
    problems.write_text("".join((countdown / "eval.jsonl").read_text().splitlines(keepends=True)[:8]))
    wanted = ["--benchmarks", str(problems), *EVALUATION]
    evaluation = ",".join(f'"{word}"' for word in wanted)
    jobs = submit(cluster, tmp_path, overrides, "convert=true", f"evaluation=[{evaluation}]")
    ended = {name: cluster.wait(number) for name, number in jobs.items()}
    assert {name: job["JobState"] for name, job in ended.items()} == dict.fromkeys(jobs, "COMPLETED")
    assert set(jobs) == set(TASKS) and ended["train"]["NumNodes"] == "2"
    times = [ended[name][when] for name in TASKS for when in ("StartTime", "EndTime")]
    assert times == sorted(times)
    found = json.loads((folder / "evaluation/results.json").read_text())
    assert found["settings"]["model"][0] == str(folder / "hf") and found["benchmarks"]["eval"]["problems"] == 8
    assert len(metrics(folder)) == 2 and (folder / "report.html").exists()
    overrides.append(f"model.path={folder}/initial_megatron")
    assert (folder / "config.yaml").read_text() == as_yaml(load_config(ROOT / CONFIG, overrides))


def test_a_run_that_was_asked_to_save_requeues_itself_and_goes_on(
    cluster: Cluster, countdown: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    jobs = submit(cluster, tmp_path, ["trainer.num_steps=30", "data.eval_path=", f"run.dir={folder}"])
    deadline = time.monotonic() + DEADLINE
    while not (folder / "metrics.jsonl").exists() or not metrics(folder):
        assert time.monotonic() < deadline, "no first step in time"
        time.sleep(0.2)
    cluster.shell(f"scancel --signal=USR1 {jobs['train']}")
    ended = cluster.wait(jobs["report"])  # which waits for the run's end, its second part included
    train = cluster.job(jobs["train"])
    assert (ended["JobState"], train["JobState"], train["Restarts"]) == ("COMPLETED", "COMPLETED", "1")
    assert [row["step"] for row in metrics(folder)] == list(range(1, 31))
