"""The trackers that repeat metrics.jsonl elsewhere: TensorBoard, and W&B where the config names a project."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_rlvr.config import ConfigError


@dataclass(frozen=True)
class Tracker:
    """A mirror of the metrics: ``log(step, {name: number})``, then ``close()``."""

    name: str
    log: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


def open_tensorboard(run_dir: Path, resume_step: int) -> Tracker:
    """Event files under RUN/tensorboard; steps after ``resume_step`` are hidden from an earlier run's files."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"logging.tensorboard is on but tensorboard cannot be imported ({error}): "
            "pip install tensorboard, or set logging.tensorboard=false"
        ) from error
    writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def log_step(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker("TensorBoard", log_step, writer.close)


def open_wandb(run_dir: Path, project: str, name: str, config: dict, resume_step: int) -> Tracker:
    """A W&B run, online or (WANDB_MODE=offline) under RUN/wandb; a resumed run goes on in the same W&B run."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"logging.wandb_project={project!r} but wandb cannot be imported ({error}): "
            "pip install wandb, or set logging.wandb_project=''"
        ) from error
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
    return Tracker("W&B", lambda step, values: run.log({"step": step} | values), run.finish)
