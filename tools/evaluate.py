"""A model's figures on benchmarks: python tools/evaluate.py MODEL_OR_RUN --benchmarks aime24,amc23 --output DIR ..."""

from __future__ import annotations

import argparse
import sys
from dataclasses import MISSING, fields

from rich.console import Console

from megatron_rlvr.benchmarks import BENCHMARKS
from megatron_rlvr.config import ConfigError
from megatron_rlvr.evaluation_settings import Settings
from megatron_rlvr.processes import leave
from megatron_rlvr.verifiers import VerifierError

WIDTH = 160  # characters of a line, and of the table, in a log file


def main() -> int:
    parser = argparse.ArgumentParser(description="Sample a model on benchmarks and judge it; a killed one goes on.")
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="Hugging Face or Megatron folder, checkpoint, or run")
    parser.add_argument("--output", required=True, help="folder for samples/, settings.json and results.json")
    parser.add_argument(
        "--benchmarks",
        required=True,
        type=lambda text: [name for name in text.split(",") if name],
        help=f"with commas: {', '.join(BENCHMARKS)}, or files of your own",
    )
    for item in fields(Settings):
        if item.default is not MISSING:
            parser.add_argument(
                f"--{item.name.replace('_', '-')}",
                type=type(item.default),
                default=item.default,
                help=f"{item.metadata['help']} (default: {item.default!r})",
            )
    settings = Settings(**vars(parser.parse_args()))
    try:
        from megatron_rlvr.evaluate import evaluate  # imports of seconds, which a wrong command does not wait for

        evaluate(settings, Console(width=None if sys.stdout.isatty() else WIDTH))
    except (ConfigError, VerifierError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(main())
