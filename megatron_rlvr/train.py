"""The door: ``python -m megatron_rlvr.train CONFIG key=value ...`` starts the ranks; under torchrun it is one of them.

Exit codes: 0 done, 2 a mistake in the config, the data or the command, 1 anything else, 128 + N stopped by signal N.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO

from megatron_rlvr.config import Config, ConfigError, load_config
from megatron_rlvr.processes import StopRequest, die_with_parent, everything_made_here_stays, leave
from megatron_rlvr.run_folder import INITIAL, PATIENCE, hold, prepare_folder

LAUNCHED = "MEGATRON_RLVR_LAUNCHED"  # set for ranks whose launcher has already prepared model and folder
USER_ERROR, FAILURE = 2, 1


def main(arguments: list[str] | None = None) -> int:
    """Parse the command, then launch the ranks or be one. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="megatron_rlvr.train", description="Train a policy with verifiable rewards.")
    parser.add_argument("config", help="YAML file; see examples/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, for example parallel.tp=2")
    parsed = parser.parse_args(arguments)
    try:
        config = load_config(parsed.config, parsed.overrides)
        return be_rank(config) if "RANK" in os.environ else launch(config, arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def launch(config: Config, arguments: list[str]) -> int:
    """Start tp * cp * pp * dp ranks on this machine and see them through."""
    from megatron_rlvr.launch.local import run_ranks

    command = [sys.executable, "-m", "megatron_rlvr.train", *arguments]
    with _prepare(config):
        return run_ranks(command, config.world_size, config.run.port, {LAUNCHED: "1"})


def _prepare(config: Config) -> IO[str]:
    """Whatever can be refused is refused here, in one process, before the slow imports of Megatron and vLLM.

    Returns the file that keeps other runs out of the folder as long as it is open.
    """
    from megatron_rlvr import preflight
    from megatron_rlvr.checkpoint_folder import checkpoints
    from megatron_rlvr.config_changes import check_newest
    from megatron_rlvr.environment import record_start
    from megatron_rlvr.exploration.base import all_filled
    from megatron_rlvr.weights.initial import write_initial

    preflight.prepare(config)
    preflight.check(config)
    lock = hold(config.run_dir, 0.0 if config.run.resume == "never" else PATIENCE)
    folder = prepare_folder(config)
    if config.run.resume != "never":
        check_newest(config, folder)
    record_start(folder, all_filled(config.exploration))
    if config.model.random_init and not checkpoints(folder):
        write_initial(config.model.path, folder / INITIAL, config.seed)
    return lock


def be_rank(config: Config) -> int:
    """One rank's whole life. Its output goes to RUN/logs/rank_R.log; rank 0 keeps the terminal for what people read."""
    die_with_parent()
    rank = int(os.environ["RANK"])
    if int(os.environ["WORLD_SIZE"]) != config.world_size:
        raise ConfigError(
            f"{os.environ['WORLD_SIZE']} ranks were started, but parallel.tp * cp * pp * dp = {config.world_size}: "
            f"set parallel.dp so that they agree"
        )
    with _prepare(config) if rank == 0 and LAUNCHED not in os.environ else nullcontext():
        return _train(config, rank)


def _train(config: Config, rank: int) -> int:
    if config.model.random_init:
        config.model.path, config.model.random_init = str(config.run_dir / INITIAL), False
    terminal = _redirect_output(config.run_dir / "logs" / f"rank_{rank}.log")
    stop = StopRequest()  # before the slow imports: a signal during them is kept for the first step's end
    try:
        return _run(config, terminal, stop)
    except ConfigError as error:
        with suppress(OSError):  # the log may be on the disk that is full; the terminal must hear of it all the same
            traceback.print_exc()
        if rank == 0:
            print(f"error: {error}", file=terminal, flush=True)
        return USER_ERROR
    except Exception as error:
        with suppress(OSError):
            traceback.print_exc()
        print(
            f"error on rank {rank}: {type(error).__name__}: {error}\n  see {config.run_dir}/logs/rank_{rank}.log",
            file=terminal,
            flush=True,
        )
        return FAILURE


class _Terminal(io.TextIOWrapper):
    """Where people look on: that it is full, or that nobody reads it any more (| head), ends no run."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _redirect_output(path: Path) -> IO[str]:
    """Send this process's standard output and error, C++ libraries included, to a file; returns the former output."""
    path.parent.mkdir(parents=True, exist_ok=True)
    terminal = _Terminal(os.fdopen(os.dup(1), "wb"), line_buffering=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return terminal


def _run(config: Config, terminal: IO[str], stop: StopRequest) -> int:
    from rich.console import Console

    console = Console(file=terminal)
    _log_to(terminal)
    with everything_made_here_stays():
        from megatron_rlvr import platform

        platform.set_cuda_environment()
        from megatron_rlvr.run import Run

        run = Run(config, console, stop)
    stopped = run()
    run.trainer.close()
    return 128 + stopped if stopped else 0


def _log_to(terminal: IO[str]) -> None:
    """What the package itself has to say goes to the log file, and from rank 0 to the person at the terminal."""
    package = logging.getLogger("megatron_rlvr")
    package.setLevel(logging.INFO)
    package.addHandler(logging.StreamHandler())
    if os.environ["RANK"] == "0":
        package.addHandler(logging.StreamHandler(terminal))


if __name__ == "__main__":
    leave(main())
