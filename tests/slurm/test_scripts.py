"""The job scripts against a real Slurm: they train, stop and go on, name what failed, and sweep."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.integration.conftest import metrics, without_times
from tests.slurm.conftest import DEADLINE, Cluster

pytestmark = pytest.mark.slurm

COUNTDOWN = "examples/countdown_cpu/config.yaml"
QUICK = "logging.tensorboard=false data.eval_path= rollout.prompts_per_step=8 rollout.responses_per_prompt=8"
GRID = "parallel.tp=2 parallel.dp=2"


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + DEADLINE
    path = folder / "metrics.jsonl"
    while not (path.exists() and len(path.read_text().splitlines()) >= step):
        assert time.monotonic() < deadline, f"no step {step} in time"
        time.sleep(0.05)


def log_of(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("job_*.log"))


@pytest.fixture(scope="module")
def whole(cluster: Cluster, countdown: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbs: a bare sbatch, 2 nodes x 2 ranks, tp 2 x dp 2."""
    folder = tmp_path_factory.mktemp("whole")
    options = f"--nodes=2 --ntasks-per-node=2 --output={folder}/job_%j.log"
    job = cluster.submit(
        f"sbatch {options} slurm/train.sh {COUNTDOWN} {GRID} {QUICK} trainer.num_steps=6 run.dir={folder} --no-plan"
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED", log_of(folder)
    return folder


def test_a_bare_sbatch_trains_on_two_nodes(whole: Path, cluster: Cluster) -> None:
    assert [row["step"] for row in metrics(whole)] == [1, 2, 3, 4, 5, 6]
    assert "4 ranks are fit to train" in log_of(whole) and "all-reduce on n1+n2" in log_of(whole)
    assert sorted(path.name for path in (whole / "logs").glob("*.log")) == [f"rank_{rank}.log" for rank in range(4)]
    (start,) = [json.loads(line) for line in (whole / "starts.jsonl").read_text().splitlines()]
    assert start["versions"]["torch"] and start["slurm"]["SLURM_JOB_NODELIST"] == "n[1-2]"
    assert "megatron_rlvr.train" in start["command"]
    arguments = f"{COUNTDOWN} {GRID} {QUICK} trainer.num_steps=6 run.dir={whole}"
    resolved = cluster.shell(f"source $SITE; $PYTHON -m megatron_rlvr.launch.resolve {arguments}")
    assert (whole / "config.yaml").read_text() == resolved


def test_a_signal_saves_requeues_and_goes_on_exactly(whole: Path, cluster: Cluster, tmp_path: Path) -> None:
    """USR1, as Slurm sends it ahead of a time limit: the same job, its figures bit for bit those of the whole run."""
    job = cluster.submit(
        f"bash slurm/train.sh {COUNTDOWN} {GRID} {QUICK} trainer.num_steps=6 run.dir={tmp_path} --no-plan"
    )
    wait_for_step(tmp_path, 1)
    cluster.shell(f"scancel --signal=USR1 {job}")
    done = cluster.wait(job)
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "1"), log_of(tmp_path)
    assert "SIGUSR1: stopped after step" in log_of(tmp_path) and "resuming" in log_of(tmp_path)
    assert len((tmp_path / "starts.jsonl").read_text().splitlines()) == 2
    assert without_times(metrics(tmp_path)) == without_times(metrics(whole))
    assert (tmp_path / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    weights = Path("hf", "model.safetensors")
    assert (tmp_path / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_killed_rank_ends_the_job_with_its_error_on_top(cluster: Cluster, countdown: Path, tmp_path: Path) -> None:
    job = cluster.submit(
        f"bash slurm/train.sh {COUNTDOWN} {GRID} {QUICK} trainer.num_steps=1000 run.dir={tmp_path} --no-plan"
    )
    wait_for_step(tmp_path, 1)
    rank_of = {process.environ()["RANK"]: process for process in training(tmp_path)}
    os.kill(rank_of["3"].pid, signal.SIGKILL)
    killed = time.monotonic()
    assert cluster.wait(job, deadline=60)["JobState"] == "FAILED"
    assert time.monotonic() - killed < 60
    assert log_of(tmp_path).startswith("rank 3 ended first: n2: task 3: Killed"), log_of(tmp_path)
    assert training(tmp_path) == []


def training(folder: Path) -> list[psutil.Process]:
    """The ranks that train in ``folder``."""
    found = []
    for process in psutil.process_iter():
        try:
            if "megatron_rlvr.train" in process.cmdline() and f"run.dir={folder}" in process.cmdline():
                found += [process] if "python" in process.name() else []
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def test_an_array_trains_three_seeds(cluster: Cluster, countdown: Path, tmp_path: Path) -> None:
    job = cluster.submit(
        f"bash slurm/train.sh {COUNTDOWN} {QUICK} trainer.num_steps=1 run.dir={tmp_path} --seeds 3,5,8 --no-plan"
        " -- --array=0-2%1"
    )
    for task in range(3):
        assert cluster.wait(f"{job}_{task}")["JobState"] == "COMPLETED", log_of(tmp_path)
    configs = {seed: yaml.safe_load((tmp_path / f"seed_{seed}/config.yaml").read_text()) for seed in (3, 5, 8)}
    assert [config["seed"] for config in configs.values()] == [3, 5, 8]
    assert len({json.dumps(without_times(metrics(tmp_path / f"seed_{seed}"))) for seed in configs}) == 3


def test_a_job_waits_for_the_one_before_it(cluster: Cluster, countdown: Path, tmp_path: Path) -> None:
    """Train, then a report of it; and a report that waits for a run that fails is never made."""
    train = cluster.submit(f"bash slurm/train.sh {COUNTDOWN} {QUICK} trainer.num_steps=1 run.dir={tmp_path} --no-plan")
    report = cluster.submit(f"bash slurm/tool.sh tools/report.py {tmp_path} -- --dependency=afterok:{train}")
    assert cluster.job(report)["JobState"] == "PENDING"
    again = cluster.submit(
        f"bash slurm/train.sh {COUNTDOWN} {QUICK} run.dir={tmp_path} --no-plan -- --dependency=afterany:{train}"
    )
    never = cluster.submit(
        f"bash slurm/tool.sh tools/report.py {tmp_path} -- --dependency=afterok:{again} --kill-on-invalid-dep=yes"
    )
    assert cluster.wait(train)["JobState"] == cluster.wait(report)["JobState"] == "COMPLETED", log_of(tmp_path)
    assert (cluster.wait(again)["JobState"], cluster.wait(never)["JobState"]) == ("FAILED", "CANCELLED")


def test_convert_train_evaluate_as_a_chain(cluster: Cluster, countdown: Path, tmp_path: Path) -> None:
    """A Megatron folder is made, trained from, and the trained model measured: each job once the one before is done."""
    megatron, run = tmp_path / "megatron", tmp_path / "run"
    convert = cluster.submit(
        f"bash slurm/tool.sh tools/convert_hf.py import --hf {countdown}/model --megatron {megatron} --tp 2"
    )
    train = cluster.submit(
        f"bash slurm/train.sh {COUNTDOWN} {GRID} {QUICK} model.path={megatron} trainer.num_steps=2 run.dir={run}"
        f" -- --dependency=afterok:{convert}"
    )
    measure = f"--benchmarks {countdown}/eval.jsonl --verifier countdown --template raw --max-tokens 7"
    evaluate = cluster.submit(
        f"bash slurm/tool.sh tools/evaluate.py {run} --output {run}/evaluation {measure} --kv-cache-mib 64 --samples 4"
        f" --temperature 1 --top-p 1 -- --dependency=afterok:{train}"
    )
    ended = [cluster.wait(job) for job in (convert, train, evaluate)]
    assert [job["JobState"] for job in ended] == ["COMPLETED"] * 3, log_of(run)
    assert [job[when] for job in ended for when in ("StartTime", "EndTime")] == sorted(
        job[when] for job in ended for when in ("StartTime", "EndTime")
    )
    assert ended[1]["NumNodes"] == "2" and [row["step"] for row in metrics(run)] == [1, 2]
    found = json.loads((run / "evaluation/results.json").read_text())
    assert found["settings"]["model"][0] == str(run / "hf")
    assert 0 < found["benchmarks"]["eval"]["avg@4"]["value"] < 1  # the warmed-up model solves some puzzles


def test_a_node_that_is_unfit_ends_the_job_by_name(cluster: Cluster, countdown: Path, tmp_path: Path) -> None:
    """The site promises GPUs, and none is there."""
    options = f"--nodes=2 --ntasks-per-node=1 --output={tmp_path}/job_%j.log --export=ALL,SITE={tmp_path}/site.sh"
    (tmp_path / "site.sh").write_text((cluster.folder / "site.sh").read_text().replace("=cpu", "=h100"))
    job = cluster.submit(f"sbatch {options} slurm/train.sh {COUNTDOWN} {QUICK} run.dir={tmp_path}/run --no-plan")
    assert cluster.wait(job)["JobState"] == "FAILED"
    assert "unfit: node n1, rank 0: no GPU for local rank 0; 0 are visible" in log_of(tmp_path)
    assert "unfit: node n2, rank 1: no GPU for local rank 0; 0 are visible" in log_of(tmp_path)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_smoke_runs_the_same_script_on_the_tiny_model(cluster: Cluster, countdown: Path, tmp_path: Path) -> None:
    job = cluster.submit(f"bash slurm/lpreg_qwen32b.sh --smoke --no-plan run.dir={tmp_path}")
    assert cluster.wait(job)["JobState"] == "COMPLETED", log_of(tmp_path / "smoke")
    config = yaml.safe_load((tmp_path / "smoke/config.yaml").read_text())
    assert config["exploration"]["lp_reg"]["preset"] == "paper"
    assert [row["step"] for row in metrics(tmp_path / "smoke")] == [1, 2]


def test_the_headers_ask_for_64_gpus(cluster: Cluster) -> None:
    for script in ("lpreg_qwen32b", "lpreg_qwen14b", "cde_qwen4b", "baseline", "train"):
        assert "using 64 processors on nodes n[1-8]" in cluster.shell(f"sbatch --test-only slurm/{script}.sh")
