"""NeMo-Run, in the launcher's environment: what a dry run shows, and an experiment on this machine."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from megatron_rlvr.config import as_yaml, load_config
from tests.launch.launcher import ROOT, launch, needs_launcher

GOLDEN = Path(__file__).with_name("nemo_run_slurm.golden")

pytestmark = [pytest.mark.slow, needs_launcher]


def without_noise(text: str, home: Path) -> str:
    """Paths and ids of this run, and the margins of NeMo-Run's log, taken out."""
    text = text.replace(str(home), "NEMORUN_HOME").replace(str(ROOT), "ROOT")
    text = re.sub("─+", "─", re.sub(r"_\d{19}", "_ID", text))
    lines = [re.sub(r" +(launcher|experiment)\.py:\d+$", "", line.rstrip()) for line in text.splitlines()]
    return "\n".join(re.sub(r"^(\[[\d:]+\]| {10})( |$)", "", line).rstrip() for line in lines)


def test_a_dry_run_shows_everything_that_would_run(tmp_path: Path) -> None:
    shown = launch(
        tmp_path,
        *("--executor", "slurm", "--dryrun", "run.executor.account=me", "workdir=/shared/megatron_rlvr"),
        *("convert=true", 'evaluation=["--benchmarks","aime24","--tp","4"]', 'overrides=["trainer.num_steps=2"]'),
    )
    assert "predicted memory of the fullest rank" in shown
    config = load_config(ROOT / "examples/lp_reg/qwen2.5_32b/lp_reg_on.yaml", ["trainer.num_steps=2"])
    assert f"# resolved config\n{as_yaml(config)}" in shown
    scripts = without_noise(shown[shown.index("# task convert") :], tmp_path)
    if "MEGATRON_RLVR_WRITE_GOLDEN" in os.environ:
        GOLDEN.write_text(scripts + "\n")
    assert scripts + "\n" == GOLDEN.read_text()


def test_what_the_planner_refuses_is_not_submitted(tmp_path: Path) -> None:
    shown = launch(tmp_path, "--executor", "slurm", 'overrides=["parallel.tp=16","parallel.dp=4"]', code=2)
    assert "fix: parallel" in shown


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ('overrides=["paralel.tp=2"]', "error: unknown key 'paralel'; did you mean 'parallel'"),
        ("config=nowhere.yaml", "error: cannot read the config nowhere.yaml"),
        ("run.executor.nodes=3", "error: 64 ranks do not fill executor.nodes=3 evenly"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, argument: str, message: str) -> None:
    shown = launch(tmp_path, "--executor", "slurm", "--dryrun", argument, code=2)
    assert message in shown and "Unexpected error" not in shown


def test_an_experiment_on_this_machine(tmp_path: Path) -> None:
    """Convert, train, evaluate, report."""
    folder = tmp_path / "run"
    overrides = ["trainer.num_steps=2", "data.eval_path=", f"run.dir={folder}"]
    quoted = ",".join(f'"{override}"' for override in overrides)
    config = "examples/countdown_cpu/config.yaml"
    problems = tmp_path / "eval.jsonl"
    rows = (ROOT / "examples/countdown_cpu/build/eval.jsonl").read_text().splitlines(keepends=True)
    problems.write_text("".join(rows[:8]))
    wanted = ["--benchmarks", str(problems), "--verifier", "countdown", "--template", "raw", "--max-tokens", "7"]
    evaluation = ",".join(f'"{word}"' for word in [*wanted, "--kv-cache-mib", "64"])
    tasks = ("convert=true", f"overrides=[{quoted}]", f"evaluation=[{evaluation}]")
    launch(tmp_path, "--executor", "local", f"config={config}", f"python={sys.executable}", *tasks)
    overrides.append(f"model.path={folder}/initial_megatron")
    assert (folder / "config.yaml").read_text() == as_yaml(load_config(ROOT / config, overrides))
    found = json.loads((folder / "evaluation/results.json").read_text())
    assert found["settings"]["model"][0] == str(folder / "hf") and found["benchmarks"]["eval"]["problems"] == 8
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert (folder / "report.html").exists() and (folder / "hf" / "model.safetensors").exists()


def test_a_training_of_one_rank_saves_and_requeues_too(tmp_path: Path) -> None:
    countdown = ("config=examples/countdown_cpu/config.yaml", 'overrides=["parallel.tp=1"]', "run.executor.nodes=1")
    shown = launch(tmp_path, "--executor", "slurm", "--dryrun", *countdown)
    train, report = shown[shown.index("# task train: 1 rank(s)") :].split("# task report: 1 rank(s)", 1)
    assert '"${resume[@]}"' in train and "RANK=" not in train and "resume" not in report.partition("#SBATCH")[0]
    assert shown.count("--signal=USR1@600") == 1
