"""What the job scripts would submit: plain bash and PyYAML, so this needs no Slurm. tests/slurm submits for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_rlvr.config import as_yaml, load_config

ROOT = Path(__file__).parents[2]
COUNTDOWN = "examples/countdown_cpu/config.yaml"


@pytest.fixture
def login_node(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell on one: the site's file names MODELS and a Python that has PyYAML and nothing else."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # no site-packages
    python.chmod(0o755)
    (tmp_path / "only/yaml").parent.mkdir()
    (tmp_path / "only/yaml").symlink_to(Path(yaml.__file__).parent)
    site = tmp_path / "site.sh"
    site.write_text(
        f"export PYTHONPATH={tmp_path}/only\nLOGIN_PYTHON={python}\nMODELS=/models DATA=/data\n"
        "ACCOUNT=rlvr TIME_LIMIT=8:00:00 OVERRIDES=(logging.tensorboard=false)\n"
    )
    return {**os.environ, "SITE": str(site)}


def dry_run(environment: dict[str, str], command: str, code: int = 0) -> str:
    process = subprocess.run(
        ["bash", "-c", f"bash {command}"],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    assert process.returncode == code, process.stdout
    return process.stdout


@pytest.mark.parametrize("name", ["torch", "megatron_rlvr"])
def test_the_login_node_has_pyyaml_and_nothing_else(login_node: dict[str, str], tmp_path: Path, name: str) -> None:
    command = ["bash", "-c", f"source $SITE; $LOGIN_PYTHON -c 'import yaml, {name}'"]
    process = subprocess.run(command, env=login_node, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and f"No module named '{name}'" in process.stderr


@pytest.mark.parametrize("script", ["lpreg_qwen32b", "lpreg_qwen14b", "cde_qwen4b"])
def test_an_experiment_asks_for_64_gpus_and_shows_its_config(login_node: dict[str, str], script: str) -> None:
    output = dry_run(login_node, f"slurm/{script}.sh --dry-run --no-plan trainer.num_steps=70")
    *config, run, command = output.splitlines()
    assert yaml.safe_load("\n".join(config))["trainer"]["num_steps"] == 70
    assert run.startswith("megatron_rlvr.train examples/") and "model.path=/models/Qwen" in run
    for option in ("--nodes=8", "--ntasks-per-node=8", "--gpus-per-node=8", "--account=rlvr", "--time=8:00:00"):
        assert f" {option} " in command
    assert command.startswith("sbatch ") and f"slurm/{script}.sh --dry-run" in command


def test_the_plan_comes_first_and_may_say_no(login_node: dict[str, str]) -> None:
    yes = dry_run(login_node, "slurm/lpreg_qwen32b.sh --dry-run")
    assert yes.index("predicted memory") < yes.index("name: qwen2.5_32b_lp_reg_on") < yes.index("sbatch --parsable")
    no = dry_run(login_node, "slurm/lpreg_qwen32b.sh --dry-run parallel.tp=2 parallel.dp=32", code=2)
    assert "REFUSED" in no and "fix: parallel." in no and "sbatch" not in no
    assert no.splitlines()[-1].startswith("error: the plan says no to examples/lp_reg/qwen2.5_32b/lp_reg_on.yaml")


def test_a_planner_that_breaks_has_not_said_no(login_node: dict[str, str], tmp_path: Path) -> None:
    """Here: for lack of a module."""
    site = tmp_path / "broken.sh"
    site.write_text(Path(login_node["SITE"]).read_text() + "export PYTHONPATH=\n")
    (tmp_path / "python").write_text(
        f'#!/bin/sh\ncase $1 in *plan.py) set -- -S "$@" ;; esac\nexec {sys.executable} "$@"\n'
    )
    output = dry_run(login_node | {"SITE": str(site)}, "slurm/lpreg_qwen32b.sh --dry-run", code=2)
    assert "No module named 'yaml'" in output
    assert output.splitlines()[-1] == "error: tools/plan.py could not plan, see above; --no-plan goes without"


def test_every_door_resolves_the_same_config(login_node: dict[str, str]) -> None:
    """The job's config is what torchrun's rank would write for the same arguments, byte for byte."""
    output = dry_run(login_node, f"slurm/train.sh {COUNTDOWN} parallel.dp=2 --dry-run --no-plan")
    shown, _, rest = output.partition("megatron_rlvr.train ")
    config, *overrides = rest.splitlines()[0].split()
    assert overrides == ["logging.tensorboard=false", "parallel.dp=2"]
    assert shown == as_yaml(load_config(ROOT / config, overrides))


def test_smoke_is_the_experiments_method_on_the_tiny_model(login_node: dict[str, str]) -> None:
    output = dry_run(login_node, "slurm/cde_qwen4b.sh --smoke --dry-run --no-plan")
    config = yaml.safe_load(output.partition("megatron_rlvr.train ")[0])
    assert config["model"]["path"] == "examples/countdown_cpu/build/model" and config["critic"]["num_heads"] == 16
    assert config["run"]["dir"] == "runs/cde_ppo_both/smoke"
    assert "--nodes=2 --ntasks-per-node=2" in output


def test_smoke_takes_whatever_the_experiment_reads_and_keeps(login_node: dict[str, str], tmp_path: Path) -> None:
    base = ROOT / "examples/cde/ppo_both.yaml"
    data = {
        "path": "",
        "sources": [{"path": "a"}],
        "eval_path": "",
        "eval_sources": [{"path": "b"}],
        "prompt_field": "q",
    }
    tree = {"base": str(base), "data": data, "critic": {"path": "models/Qwen3-8B-Base"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree | {"trainer": {"keep_best": 1, "save_every": 5}}))
    output = dry_run(login_node, f"slurm/train.sh {tmp_path}/mine.yaml --smoke --dry-run --no-plan")
    config = yaml.safe_load(output.partition("megatron_rlvr.train ")[0])
    assert (config["data"]["sources"], config["critic"]["path"], config["trainer"]["keep_best"]) == ([], "", 0)


def test_a_dry_run_inside_a_job_submits_and_trains_nothing(login_node: dict[str, str]) -> None:
    inside = login_node | {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "2"}
    output = dry_run(inside, f"slurm/train.sh {COUNTDOWN} --dry-run --no-plan")
    assert output.splitlines()[-1].startswith("sbatch --parsable")
    error = dry_run(inside, f"slurm/train.sh {COUNTDOWN} parallel.dp=4 --no-plan", code=2)
    assert "the job has 2 tasks, but parallel.tp * cp * pp * dp = 8: outside of a job, bash slurm/train.sh" in error


def test_a_site_may_name_its_gpus_and_count_those_of_a_node(login_node: dict[str, str], tmp_path: Path) -> None:
    site = tmp_path / "typed.sh"
    site.write_text(Path(login_node["SITE"]).read_text() + "GPU_NAME=h100 RANKS_PER_NODE=4\n")
    output = dry_run(login_node | {"SITE": str(site)}, "slurm/lpreg_qwen32b.sh --dry-run")
    assert " --nodes=16 --ntasks-per-node=4 --gpus-per-node=h100:4 " in output
    assert "4 ranks x 15.26 GiB" in output, "the plan's nodes are the site's"


def test_a_sweep_is_an_array_over_methods_and_seeds(login_node: dict[str, str]) -> None:
    output = dry_run(login_node, "slurm/baseline.sh grpo_on,gspo_off --seeds 1,2,3 --dry-run --no-plan -- --nice=10")
    assert "--array=0-5" in output and "--nice=10" in output and "%A_%a" in output
    assert output.count("\nseed: 1\n") == 2, "a config of each method, with its first seed"
    assert " --output=runs/jobs/baseline_%A_%a.log --job-name=baseline " in output
    single = dry_run(login_node, "slurm/baseline.sh grpo_on --dry-run --no-plan")
    assert "--array" not in single and "%j" in single


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("slurm/train.sh --dry-run", "which config?"),
        (f"slurm/train.sh {COUNTDOWN} --fast", "unknown option --fast"),
        (f"slurm/train.sh {COUNTDOWN} --seeds", "--seeds needs a list"),
        (f"slurm/train.sh {COUNTDOWN} --seeds 0,1,0", "--seeds 0,1,0: each seed is one run"),
        (
            "slurm/baseline.sh grpo_on,gspo_off run.dir=/tmp/x --dry-run --no-plan",
            "would both run in /tmp/x: give each",
        ),
        (f"slurm/train.sh {COUNTDOWN} parallel.tp=10 --dry-run --no-plan", "10 ranks do not fill nodes of 8"),
        (f"slurm/train.sh {COUNTDOWN} parallel.td=5 --dry-run --no-plan", "did you mean parallel.'tp'?"),
        ("slurm/baseline.sh grpo", "no method 'grpo'; there are: clip_higher_off"),
        ("slurm/baseline.sh", "no method ''; there are: clip_higher_off"),
        (f"slurm/train.sh {COUNTDOWN} examples/cde/ppo.yaml --dry-run --no-plan", "as many ranks each: 2 and 8"),
    ],
)
def test_a_mistake_is_one_line(login_node: dict[str, str], command: str, message: str) -> None:
    output = dry_run(login_node, command, code=2)
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert message.replace("parallel.'tp'", "'parallel.tp'") in error


def test_a_site_file_that_is_not_there(login_node: dict[str, str]) -> None:
    output = dry_run(login_node | {"SITE": "/nowhere"}, f"slurm/train.sh {COUNTDOWN} --dry-run", code=2)
    assert output.strip() == "error: SITE=/nowhere: there is no such file; copy slurm/site.sh.example"


def test_a_login_python_that_is_not_there(login_node: dict[str, str], tmp_path: Path) -> None:
    site = tmp_path / "container.sh"
    site.write_text("PYTHON=/inside/the/container/python\n")
    output = dry_run(login_node | {"SITE": str(site)}, "slurm/lpreg_qwen32b.sh --dry-run", code=2)
    assert output.strip() == (
        "error: LOGIN_PYTHON=/inside/the/container/python: there is no such program; "
        f"name a Python 3.11 that has PyYAML in {site}"
    )


def test_the_shipped_site_file_shows_the_defaults(login_node: dict[str, str], tmp_path: Path) -> None:
    site = tmp_path / "copy.sh"
    shipped = (ROOT / "slurm/site.sh.example").read_text()
    site.write_text(shipped + f"LOGIN_PYTHON={sys.executable}\n")
    output = dry_run(login_node | {"SITE": str(site)}, "slurm/train.sh examples/cde/ppo.yaml --dry-run --no-plan")
    command = output.splitlines()[-1]
    assert "--nodes=1 --ntasks-per-node=8 --gpus-per-node=8" in command
    assert "--account" not in command and "--partition" not in command


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "slurm").glob("*.sh")))
def test_the_scripts_are_bash(script: str) -> None:
    subprocess.run(["bash", "-n", f"slurm/{script}"], cwd=ROOT, check=True, timeout=60)
