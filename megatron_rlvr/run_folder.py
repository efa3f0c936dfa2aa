"""The folder of a run: what it holds, whether a run may start or go on in it.

RUN/config.yaml, starts.jsonl, metrics.jsonl, rollouts.jsonl, tokens/step_N.safetensors, report.html, summary.json,
tensorboard/, checkpoints/step_N/, logs/rank_R.log, hf/.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import IO

from megatron_rlvr import watchdog
from megatron_rlvr.checkpoint_folder import checkpoints
from megatron_rlvr.config import Config, ConfigError

HANG = Path("logs", "hang")  # the stacks of ranks that stood still
LOCK = "lock"  # held while a run goes on
PATIENCE = 240.0  # seconds in which a network file system forgets the locks of a node that died
INITIAL = "initial_hf"  # a run's own folder of random weights
RECORDS = (
    "starts.jsonl",
    "metrics.jsonl",
    "rollouts.jsonl",
    "tokens",
    "figures",
    "report.html",
    "summary.json",
    "tensorboard",
    "wandb",
    "wandb_id",
    "mlflow_id",
    "mlflow.db",
    "mlflow_files",
    "checkpoints",
    "hf",
    INITIAL,
    "logs",
    "config.yaml",  # last: it says that a run is here, so that a deletion that is killed begins again
)


def hold(folder: Path, patience: float = 0.0, what: str = "run", key: str = "run.dir") -> IO[str]:
    """Make the folder and keep other runs out of it until the file is closed, or this process is gone.

    Raises ConfigError: a run is still going on in it after ``patience`` seconds, or it cannot be made. Two jobs that
    begin at the same moment would both find it empty. A file system without locks leaves that open, and is named.
    ``what`` goes on there, and ``key`` is what the user sets to another folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise ConfigError(f"cannot make the {what}'s folder {folder}: {error.strerror}; set {key}") from error
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                lock.close()
                raise ConfigError(
                    f"another {what} is going on in {folder}: wait for its end, or set another {key}"
                ) from error
            time.sleep(1.0)
            continue
        except OSError as error:
            print(f"{folder}: {error.strerror}; see to it yourself that no other {what} writes there")
        return lock


def prepare_folder(config: Config) -> Path:
    """The run's folder, ready to write. Raises ConfigError: it holds a run, or none although it must resume one."""
    folder, resume = config.run_dir, config.run.resume
    if resume == "must" and not checkpoints(folder):
        raise ConfigError(f"run.resume=must, but {folder} holds no checkpoint: start with run.resume=never or auto")
    if resume == "never" and (folder / "config.yaml").exists():
        if not config.run.overwrite:
            raise ConfigError(
                f"{folder} already holds a run: set another run.dir, go on with run.resume=auto, "
                f"or replace it with run.overwrite=true"
            )
        print(f"replacing the earlier run in {folder}")
        for name in RECORDS:
            if name == "logs" and "RANK" in os.environ:
                continue  # the other ranks of this start write there already
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    watchdog.clear(folder / HANG)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    return folder
