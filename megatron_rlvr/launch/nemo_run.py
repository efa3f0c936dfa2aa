"""A run as a NeMo-Run experiment: convert -> train -> evaluate -> report, on this machine or through Slurm.

Imported in the launcher's environment (`make launcher`), which has neither torch nor Megatron. A task is a run.Script
that starts the trainer's own Python, so that the trainer's environment needs no NeMo-Run; ranks come from torchrun
(LocalExecutor) or from srun itself (SlurmExecutor: torchrun would kill ranks 30 s after a signal, before a long step
has ended and saved).
"""

# No postponed annotations: NeMo-Run's command line reads the fields' types as they are.
import argparse
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import nemo_run as run

from megatron_rlvr.config import Config, ConfigError, as_yaml, load_config


@dataclass
class Job:
    """What to run. Paths are those of the machine that trains; relative ones start at ``workdir``.

    Job(config="examples/countdown_cpu/config.yaml", overrides=["trainer.num_steps=2"], python=".venv/bin/python")
    """

    config: str
    overrides: list[str] = field(default_factory=list)
    python: str = ".venv/bin/python"  # of the environment that trains
    workdir: str = ""  # the repository on the machine that trains; empty: this folder
    convert: bool = False  # first make a Megatron folder of model.path, and train from that
    evaluation: list[str] = field(default_factory=list)  # arguments of tools/evaluate.py; empty: no evaluation

    def __post_init__(self) -> None:
        self.workdir = self.workdir or str(Path.cwd())

    def resolved(self) -> Config:
        """The config that every door resolves alike. Raises ConfigError."""
        return load_config(self.config, self.overrides)


@dataclass(frozen=True)
class Task:
    """One job of the experiment. Task("report", script, ranks=1, gpus=1, after=["evaluate"])."""

    name: str
    script: run.Script
    ranks: int
    gpus: int  # of one rank
    after: list[str]


def tasks(job: Job) -> list[Task]:
    """In their order, each after the one before it. Raises ConfigError for a config that cannot run."""
    config = job.resolved()
    folder, overrides = str(config.run_dir), list(job.overrides)
    commands: list[tuple[str, list[str], int]] = []
    if job.convert:
        megatron = f"{folder}/initial_megatron"
        layout = ["--tp", str(config.parallel.tp), "--pp", str(config.parallel.pp)]
        source = ["--hf", config.model.path, "--megatron", megatron]
        commands.append(("convert", ["tools/convert_hf.py", "import", *source, *layout], 1))
        overrides.append(f"model.path={megatron}")
    commands.append(("train", ["-m", "megatron_rlvr.train", job.config, *overrides], config.world_size))
    if job.evaluation:
        asked = ["--template", config.data.template, "--max-tokens", str(config.rollout.max_response_length)]
        wanted = ["--output", f"{folder}/evaluation", *asked, *job.evaluation]  # of one given twice the last counts
        commands.append(("evaluate", ["tools/evaluate.py", folder, *wanted], 1))
    commands.append(("report", ["tools/report.py", folder], 1))
    found: list[Task] = []
    for name, arguments, ranks in commands:
        gpus = _engine_ranks(job.evaluation) if name == "evaluate" else 1
        script = _script(job, arguments, ranks, is_training=name == "train")
        found.append(Task(name, script, ranks, gpus, [found[-1].name] if found else []))
    return found


def _engine_ranks(evaluation: list[str]) -> int:
    """The --tp of tools/evaluate.py, whose one process has its engine start the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tp", type=int, default=1)
    return parser.parse_known_args(evaluation)[0].tp


def _script(job: Job, arguments: list[str], ranks: int, is_training: bool) -> run.Script:
    """Bash that becomes the command; a rank of Slurm's takes its number from srun, one of torchrun's has it already."""
    lines = ["set -euo pipefail", f"cd {shlex.quote(job.workdir)}"]
    extra = ""
    if ranks > 1:
        lines.append('export RANK="${RANK:-$SLURM_PROCID}" LOCAL_RANK="${LOCAL_RANK:-$SLURM_LOCALID}"')
    if is_training:
        # Only a requeued job goes on: a new one that finds a run in its folder is a mistake.
        lines.append('resume=(); [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || resume=(run.resume=auto)')
        extra = ' "${resume[@]}"'
    lines.append(f"exec {shlex.join([job.python, *arguments])}{extra}")
    return run.Script(inline="\n".join(lines) + "\n")


@dataclass(kw_only=True)
class EnvironmentPlugin(run.Plugin):
    """Variables of every task; one thread per process, as the ranks of a node share its cores."""

    variables: dict[str, str] = field(default_factory=lambda: {"OMP_NUM_THREADS": "1"})

    def setup(self, task: run.Script, executor: run.Executor) -> None:
        executor.env_vars = executor.env_vars | self.variables


@dataclass(kw_only=True)
class PreemptionPlugin(run.Plugin):
    """USR1 to the ranks ``seconds_before`` the time limit: they end their step, save, and the job requeues itself.

    At most ``requeues`` times. A preempting job's TERM saves too, and Slurm then requeues by itself.
    """

    seconds_before: int = 600
    requeues: int = 10

    def setup(self, task: run.Script, executor: run.Executor) -> None:
        if isinstance(executor, run.SlurmExecutor):
            executor.signal = f"USR1@{self.seconds_before}"
            executor.additional_parameters = (executor.additional_parameters or {}) | {"requeue": True}
            executor.retries = self.requeues
            executor.setup_lines = (executor.setup_lines or "") + ONLY_WHEN_SAVED


# NeMo-Run's batch script requeues a job that ended with any error, a mistake in the config too.
ONLY_WHEN_SAVED = """\
scontrol() { [ "$1" != requeue ] || [ "$exitcode" = 138 ] || return 0; command scontrol "$@"; } # 138: saved on USR1
"""


def for_task(executor: run.Executor, job: Job, task: Task) -> run.Executor:
    """A copy of the executor with as many ranks as the task has. Raises ConfigError: nodes cannot share them evenly."""
    made = executor.clone()
    if isinstance(made, run.SlurmExecutor):
        nodes = 1 if task.ranks == 1 else made.nodes
        if task.ranks % nodes:
            raise ConfigError(f"{task.ranks} ranks do not fill executor.nodes={nodes} evenly: change one of them")
        made.nodes, made.ntasks_per_node = nodes, task.ranks // nodes
        if made.gpus_per_node:
            made.gpus_per_node = made.ntasks_per_node * task.gpus
        made.setup_lines = CORES + (MEETING_POINT if task.ranks > 1 else "")
    elif task.ranks > 1:
        made.launcher, made.ntasks_per_node = "torchrun", task.ranks
        made.env_vars = made.env_vars | {"PATH": f"{Path(job.workdir, job.python).parent}:{os.environ['PATH']}"}
    return made


# srun would give a task one core, for itself, its engine and its verifiers.
CORES = """\
export SRUN_CPUS_PER_TASK=$((SLURM_CPUS_ON_NODE * SLURM_JOB_NUM_NODES / SLURM_NTASKS))
"""

# What torchrun would set. The address is the one at which Slurm itself reaches the first node.
MEETING_POINT = """\
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR=$(scontrol --oneliner show node "$first_node" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) WORLD_SIZE=$SLURM_NTASKS
"""


def describe(job: Job) -> str:
    """What a dry run adds to NeMo-Run's own account: the resolved config, and what each task runs."""
    parts = ["# resolved config", as_yaml(job.resolved())]
    for task in tasks(job):
        behind = f", after {', '.join(task.after)}" if task.after else ""
        parts += [f"# task {task.name}: {task.ranks} rank(s){behind}", task.script.inline]
    return "\n".join(parts)


def add_tasks(experiment: run.Experiment, job: Job, executor: run.Executor, plugins: list[run.Plugin]) -> None:
    """The job's tasks in the experiment, each depending on the one before it."""
    added: dict[str, str] = {}
    for task in tasks(job):
        used = (
            plugins if task.name == "train" else [plugin for plugin in plugins if isinstance(plugin, EnvironmentPlugin)]
        )
        added[task.name] = experiment.add(
            task.script,
            executor=for_task(executor, job, task),
            name=task.name,
            plugins=used,
            dependencies=[added[name] for name in task.after],
        )
