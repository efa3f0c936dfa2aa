"""The trackers that repeat metrics.jsonl elsewhere: TensorBoard, and W&B and MLflow where the config asks for them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_rlvr.config import ConfigError, LoggingConfig, flat, rule

MLFLOW_BATCH = 100  # parameters that its server takes at once (mlflow/utils/validation.py)


@dataclass(frozen=True)
class Tracker:
    """A mirror of the metrics: ``log(step, {name: number})``, then ``close(failed)``."""

    name: str
    log: Callable[[int, dict[str, float]], None]
    close: Callable[[bool], None]


def open_trackers(run_dir: Path, settings: LoggingConfig, name: str, config: dict, resume_step: int) -> list[Tracker]:
    """Those that the config asks for. Raises ConfigError: one is not installed, or does not start."""
    check_installed(settings)
    trackers = []
    if settings.tensorboard:
        trackers.append(open_tensorboard(run_dir, resume_step))
    if settings.wandb_project:
        trackers.append(open_wandb(run_dir, settings.wandb_project, name, config, resume_step))
    if settings.mlflow_experiment:
        trackers.append(open_mlflow(run_dir, settings.mlflow_experiment, name, config, resume_step))
    return trackers


def check_installed(settings: LoggingConfig) -> None:
    """Raises ConfigError for a tracker that the config asks for and this machine lacks."""
    for package, wanted, without in (
        ("tensorboard", settings.tensorboard, "tensorboard=false"),
        ("wandb", settings.wandb_project, "wandb_project=''"),
        ("mlflow", settings.mlflow_experiment, "mlflow_experiment=''"),
    ):
        rule(
            not wanted or find_spec(package) is not None,
            f"logging.{without.partition('=')[0]}={wanted} but {package} is not installed: pip install {package}, or "
            f"set logging.{without}",
        )


def open_tensorboard(run_dir: Path, resume_step: int) -> Tracker:
    """Event files under RUN/tensorboard; steps after ``resume_step`` are hidden from an earlier run's files."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def log_step(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker("TensorBoard", log_step, lambda failed: writer.close())


def open_wandb(run_dir: Path, project: str, name: str, config: dict, resume_step: int) -> Tracker:
    """A W&B run, online or (WANDB_MODE=offline) under RUN/wandb; a resumed run goes on in the same W&B run."""
    import wandb

    id_file = run_dir / "wandb_id"
    earlier = id_file.read_text().strip() if resume_step and id_file.exists() else None
    try:
        run = wandb.init(
            project=project,
            name=name or None,
            config=config,
            dir=str(run_dir),
            id=earlier,
            resume="allow" if earlier else None,
        )
    except Exception as error:
        raise ConfigError(
            f"W&B does not start for logging.wandb_project={project!r}: {str(error).rstrip('.')}; "
            "log in, set WANDB_MODE=offline, or set logging.wandb_project=''"
        ) from error
    id_file.write_text(run.id)
    # W&B refuses steps that it has seen, which a resumed run sends again: `step` is a metric and the x axis instead.
    run.define_metric("*", step_metric="step")
    return Tracker(
        "W&B",
        lambda step, values: run.log({"step": step} | values),
        lambda failed: run.finish(exit_code=int(failed)),
    )


def open_mlflow(run_dir: Path, experiment: str, name: str, config: dict, resume_step: int) -> Tracker:
    """An MLflow run where MLFLOW_TRACKING_URI says, or in RUN/mlflow.db; a resumed run goes on in the same one."""
    from mlflow import MlflowClient

    id_file = run_dir / "mlflow_id"
    earlier = id_file.read_text().strip() if resume_step and id_file.exists() else None
    try:
        server, here = os.environ.get("MLFLOW_TRACKING_URI"), run_dir.resolve()
        client = MlflowClient(server or f"sqlite:///{here}/mlflow.db")
        known = client.get_experiment_by_name(experiment)
        files = None if server else str(here / "mlflow_files")
        home = known.experiment_id if known else client.create_experiment(experiment, files)
        identity = earlier or client.create_run(home, run_name=name or None).info.run_id
        if earlier:
            client.update_run(identity, status="RUNNING")
        else:
            client.log_dict(identity, config, "config.yaml")
            _log_params(client, identity, config)
    except Exception as error:
        raise ConfigError(
            f"MLflow does not start for logging.mlflow_experiment={experiment!r}: {str(error).rstrip('.')}; "
            "set MLFLOW_TRACKING_URI to a server that answers, or unset it, or set logging.mlflow_experiment=''"
        ) from error
    id_file.write_text(identity)

    def log_step(step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_mlflow_name(metric), value, now, step) for metric, value in values.items()]
        client.log_batch(identity, metrics=metrics)

    return Tracker(
        "MLflow", log_step, lambda failed: client.set_terminated(identity, "FAILED" if failed else "FINISHED")
    )


def _log_params(client: Any, identity: str, config: dict) -> None:
    """Every key as a parameter: what MLflow's tables compare runs by."""
    from mlflow.entities import Param

    params = [Param(_mlflow_name(key), str(value)) for key, value in flat(config).items()]
    for start in range(0, len(params), MLFLOW_BATCH):
        client.log_batch(identity, params=params[start : start + MLFLOW_BATCH])


def _mlflow_name(metric: str) -> str:
    """The name in the characters that MLflow takes; names of held-out files may have others."""
    return re.sub(r"[^\w.\- :/]", "_", metric.replace("@", "_at_"))
