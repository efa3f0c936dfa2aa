"""What the job's own shell does when it is preempted, cancelled or broken: real Slurm, a clock in place of training."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.conftest import Cluster

pytestmark = pytest.mark.slurm

# Stands for the ranks' Python: nodes are fit, and "training" lasts ten seconds unless it is told to stop.
CLOCK = f"""#!{sys.executable}
import os, signal, sys, time
got = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: got.append(number))
if "megatron_rlvr.launch.health" in sys.argv:
    sys.exit(0)
print("begins", *sys.argv[-1:], flush=True)
if "name=broken" in sys.argv and os.environ["RANK"] == "3":
    time.sleep(3)  # until the others have begun
    os.kill(os.getpid(), signal.SIGKILL)
for tick in range(50):
    time.sleep(0.2)
    if got:
        print("saved", flush=True)
        sys.exit(128 + got[0])
"""


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> str:
    """The site's file with the clock for a Python."""
    clock = tmp_path / "python"
    clock.write_text(CLOCK)
    clock.chmod(0o755)
    lines = (cluster.folder / "site.sh").read_text() + f"LOGIN_PYTHON=$PYTHON\nPYTHON={clock}\n"
    (tmp_path / "site.sh").write_text(lines)
    return str(tmp_path / "site.sh")


@pytest.fixture
def submit(cluster: Cluster, site: str, tmp_path: Path):
    """submit() -> the number of a job that has begun, and the file of its log; of an array's last task, with seeds."""

    def start(name: str = "whole", seeds: str = "") -> tuple[str, Path]:
        script = "bash slurm/train.sh examples/countdown_cpu/config.yaml parallel.dp=2 --no-plan"
        options = f"name={name} run.dir={tmp_path}/run" + (f" --seeds {seeds}" if seeds else "")
        output = cluster.shell(f"{script} {options}", SITE=site)
        number = re.findall(r"submitted job (\d+)", output)[0]
        log = tmp_path / (f"run/job_{number}_{seeds.count(',')}.log" if seeds else f"run/job_{number}.log")
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("begins") == 4):
            assert time.monotonic() < deadline, log.read_text() if log.exists() else output
            time.sleep(0.1)
        return number, log

    return start


def test_a_preempted_job_goes_on_by_itself(cluster: Cluster, submit) -> None:
    job, log = submit()
    urgent = cluster.shell("sbatch --parsable -p urgent -N 8 --exclusive -o /dev/null --wrap true").strip()
    assert cluster.wait(urgent, deadline=60)["JobState"] == "COMPLETED"
    done = cluster.wait(job, deadline=120)
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert log.read_text().count("begins run.resume=auto") == 4


def test_a_signal_ahead_of_the_time_limit_requeues(cluster: Cluster, submit) -> None:
    """As --signal=B:USR1@N sends it: to the job's shell alone."""
    job, log = submit()
    cluster.shell(f"scancel --batch --signal=USR1 {job}")
    done = cluster.wait(job, deadline=120)
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert log.read_text().count("begins run.resume=auto") == 4


def test_a_job_without_time_for_a_step_requeues_itself_once(cluster: Cluster, submit) -> None:
    job, log = submit()
    cluster.shell(f"scancel --batch --signal=USR1 {job}")
    deadline = time.monotonic() + 60
    while log.read_text().count("begins") < 8:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    cluster.shell(f"scancel --batch --signal=USR1 {job}")
    done = cluster.wait(job, deadline=120)
    assert (done["JobState"], done["Restarts"]) == ("FAILED", "1"), log.read_text()
    assert "error: requeued, and again no step was saved before the time limit" in log.read_text()


def test_the_last_task_of_an_array_requeues_itself_alone(cluster: Cluster, submit) -> None:
    """Its job number is the array's."""
    job, log = submit(seeds="0,1,2")
    cluster.shell(f"scancel --batch --signal=USR1 {job}_2")
    done = [cluster.wait(f"{job}_{task}", deadline=120) for task in range(3)]
    assert [(task["JobState"], task["Restarts"]) for task in done] == [("COMPLETED", restarts) for restarts in "001"]
    assert log.read_text().count("begins run.resume=auto") == 4


def test_the_last_task_of_an_array_has_its_error_on_top(cluster: Cluster, submit) -> None:
    job, log = submit("broken", seeds="0,1")
    assert cluster.wait(f"{job}_1", deadline=60)["JobState"] == "FAILED"
    assert re.match(r"rank 3 ended first: n\d: task 3: Killed", log.read_text()), log.read_text()


def test_a_bare_sbatch_of_a_sweep_is_refused(cluster: Cluster, site: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = f"--wait --nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --open-mode=truncate --output={log}"
    for sweep in ("baseline.sh grpo_on,gspo_off --seeds 1,2,3", "train.sh examples/cde/ppo.yaml --seeds 0,1,2,3,4,5"):
        cluster.shell(f"sbatch {options} slurm/{sweep} --no-plan", code=2, SITE=site)
        remedy = f"bash slurm/{sweep.partition(' ')[0]} makes it one, or sbatch --array=0-5"
        assert log.read_text() == f"error: 6 runs, but the job is no array: {remedy}\n"


def test_a_killed_rank_ends_the_job_and_is_named_on_top(cluster: Cluster, submit) -> None:
    job, log = submit("broken")
    assert cluster.wait(job, deadline=60)["JobState"] == "FAILED"
    assert log.read_text().startswith("rank 3 ended first: n2: task 3: Killed."), log.read_text()
    assert log.read_text().count("saved") == 3, "the others were told to stop, and did"


def test_a_plan_that_says_no_ends_the_job_at_once(cluster: Cluster, tmp_path: Path) -> None:
    """The bare sbatch of 64 GPUs, with a layout that does not fit them."""
    log = tmp_path / "job.log"
    job = cluster.shell(
        f"sbatch --parsable -o {log} slurm/lpreg_qwen32b.sh parallel.tp=2 parallel.dp=32 run.dir={tmp_path}/run",
        SITE=str(planning_site(cluster, tmp_path)),
    ).strip()
    assert cluster.wait(job, deadline=60)["JobState"] == "FAILED"
    assert "REFUSED" in log.read_text() and "error: the plan says no" in log.read_text()
    assert not (tmp_path / "run").exists(), "no rank was started"


def test_a_tool_has_the_cores_of_its_job(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "cores.py"
    program.write_text(
        "import os, subprocess\n"
        "step = os.environ['SLURM_JOB_ID'] + '.' + os.environ['SLURM_STEP_ID']\n"
        "shown = subprocess.run(['scontrol', '-o', 'show', 'step', step], capture_output=True, text=True).stdout\n"
        f"open({str(tmp_path / 'cores')!r}, 'a').write(shown.split(' CPUs=')[1].split()[0] + ' ')\n"
    )
    for options in ("", "-- --cpus-per-task=6"):
        job = cluster.submit(f"bash slurm/tool.sh {program} {options}")
        assert cluster.wait(job, deadline=60)["JobState"] == "COMPLETED"
    assert (tmp_path / "cores").read_text() == "8 6 "


def planning_site(cluster: Cluster, folder: Path) -> Path:
    """The site's file with a GPU to plan for."""
    site = folder / "site.sh"
    site.write_text((cluster.folder / "site.sh").read_text().replace("=cpu", "=h100"))
    return site


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, submit) -> None:
    job, log = submit()
    cluster.shell(f"scancel {job}")
    assert cluster.wait(job, deadline=60)["Restarts"] == "0"
    deadline = time.monotonic() + 30
    while log.read_text().count("saved") < 4:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    assert "ended first" not in log.read_text()
