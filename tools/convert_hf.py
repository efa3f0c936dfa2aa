"""Hugging Face folder <-> Megatron folder, on a CPU: python tools/convert_hf.py import|export|verify|inspect --help"""

from __future__ import annotations

import argparse
import json
import sys
import warnings

from rich.console import Console
from rich.progress import Progress

from megatron_rlvr.config import ConfigError
from megatron_rlvr.weights.convert_export import export_megatron
from megatron_rlvr.weights.convert_import import import_hf


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {
        "import": "write --megatron from --hf",
        "export": "write --hf from --megatron, a Megatron folder or a training checkpoint",
        "verify": "compare every tensor, bit by bit, and the logits (in fp32)",
    }.items():
        command = commands.add_parser(name, help=text)
        for folder in ("hf", "megatron"):
            command.add_argument(f"--{folder}", required=True, metavar="DIR")
    for size, text in {"tp": "how far the vocabulary is padded", "pp": "stages that share no file"}.items():
        commands.choices["import"].add_argument(f"--{size}", type=int, default=1, help=text)
    models = ("policy", "critic")
    commands.choices["export"].add_argument(
        "--model", choices=models, default="policy", help="of a training checkpoint"
    )
    commands.choices["verify"].add_argument("--tensors-only", action="store_true")
    commands.add_parser("inspect", help="what a folder of either kind holds").add_argument("folder")
    return parser.parse_args()


def run(options: argparse.Namespace, progress: Progress) -> int | None:
    task = progress.add_task(options.command, visible=False)

    def advance(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total, visible=True)

    if options.command == "import":
        return import_hf(options.hf, options.megatron, options.tp, options.pp, advance)
    if options.command == "export":
        return export_megatron(options.megatron, options.hf, options.model, advance)
    warnings.simplefilter("ignore")  # Megatron lists what a machine without a GPU lacks
    from megatron_rlvr.weights import convert_verify  # an import of seconds, which the others do without

    if options.command == "verify":
        return convert_verify.report(options.hf, options.megatron, options.tensors_only, advance)
    return print(json.dumps(convert_verify.describe(options.folder), indent=2))


if __name__ == "__main__":
    try:
        with Progress(console=Console(stderr=True), redirect_stdout=False) as progress:
            sys.exit(run(parse(), progress))
    except ConfigError as error:
        sys.exit(f"error: {error}")
