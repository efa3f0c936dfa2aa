"""A Lp-Reg run through NeMo-Run: convert -> train -> evaluate -> report (README beside this file).

python examples/nemo_run/lpreg.py --executor local --dryrun
python examples/nemo_run/lpreg.py --executor slurm run.executor.account=me run.executor.partition=gpu config=FILE
"""

import sys

import nemo_run as run

from megatron_rlvr.config import ConfigError
from megatron_rlvr.launch.nemo_run import EnvironmentPlugin, Job, PreemptionPlugin, add_tasks, describe
from megatron_rlvr.planner.plan import make_plan
from megatron_rlvr.planner.shapes import NotMadeYet
from megatron_rlvr.planner.text import as_text


@run.cli.factory
@run.autoconvert
def local() -> run.LocalExecutor:
    """The ranks on this machine, under torchrun."""
    return run.LocalExecutor(packager=run.Packager())


@run.cli.factory
@run.autoconvert
def slurm() -> run.SlurmExecutor:
    """8 nodes of 8 GPUs through the Slurm of this machine; run.executor.KEY=VALUE changes what your cluster wants."""
    return run.SlurmExecutor(
        account="",
        nodes=8,
        gpus_per_node=8,
        exclusive=True,
        mem="0",
        time="1-00:00:00",
        tunnel=run.LocalTunnel(job_dir=""),
        packager=run.Packager(),
    )


@run.cli.factory
@run.autoconvert
def slurm_ssh() -> run.SlurmExecutor:
    """The same from outside the cluster, through SSH to its login node: run.executor.tunnel.host, .user, .job_dir."""
    return run.SlurmExecutor(
        account="",
        nodes=8,
        gpus_per_node=8,
        exclusive=True,
        mem="0",
        time="1-00:00:00",
        tunnel=run.SSHTunnel(host="login", user="me", job_dir="/shared/nemo_run"),
        packager=run.Packager(),
    )


def lpreg(
    ctx: run.cli.RunContext,
    config: str = "examples/lp_reg/qwen2.5_32b/lp_reg_on.yaml",
    overrides: list[str] = [],  # noqa: B006  # NeMo-Run copies it
    python: str = ".venv/bin/python",
    workdir: str = "",
    convert: bool = False,
    evaluation: list[str] = [],  # noqa: B006
    requeues: int = 10,
    seconds_before: int = 600,
    plan: bool = True,
    gpu: str = "h100",
):
    """Convert, train, evaluate and report, one after the other; launch/nemo_run.py says what each argument is.

    On Slurm nothing is submitted that the planner refuses for this ``gpu``, unless ``plan`` is false.
    """
    job = Job(config, overrides, python, workdir, convert, evaluation)
    plugins = [EnvironmentPlugin(), PreemptionPlugin(seconds_before=seconds_before, requeues=requeues), *ctx.plugins]
    try:
        if plan and isinstance(ctx.executor, run.SlurmExecutor):
            show_plan(job, gpu)
        if ctx.dryrun:
            print(describe(job))
        with run.Experiment(job.resolved().name) as experiment:
            add_tasks(experiment, job, ctx.executor, plugins)
            ctx.launch(experiment)
    except ConfigError as error:  # NeMo-Run would call it unexpected, and end with 0
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def show_plan(job: Job, gpu: str) -> None:
    """Print the plan; exit where it says no."""
    try:
        plan = make_plan(job.config, job.overrides, job.resolved().world_size, gpu)
    except NotMadeYet as reason:
        print(f"nothing to plan: {reason}")
        return
    print(as_text(plan))
    if not plan.fits:
        sys.exit(2)


if __name__ == "__main__":
    while "--executor" in sys.argv:  # what NeMo-Run writes as run.executor=NAME
        place = sys.argv.index("--executor")
        sys.argv[place : place + 2] = [f"run.executor={sys.argv[place + 1]}"]
    run.cli.main(lpreg, type="experiment")
