"""Score a file of responses: python tools/verify.py INPUT.jsonl OUTPUT.jsonl --verifier NAME"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from megatron_rlvr.config import ConfigError
from megatron_rlvr.verifiers import VerifierError
from megatron_rlvr.verify_file import verify_file


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Rows {response, answer, ...} gain {reward, status, extracted, seconds, message, right, verifier}, "
        "in order. The same command again goes on behind the last whole row."
    )
    parser.add_argument("input", type=Path, help="JSON lines with response and answer")
    parser.add_argument("output", type=Path)
    parser.add_argument("--verifier", required=True, help='a name, a Python file, or a sum: "0.9*math + 0.1*format"')
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=10.0, help="CPU seconds per row (default: %(default)s)")
    options = parser.parse_args()
    columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), auto_refresh=sys.stderr.isatty()) as bar:
            task = bar.add_task("", visible=False)  # nothing to show where the first row is refused
            counts = verify_file(
                options.input,
                options.output,
                options.verifier,
                workers=options.workers,
                deadline=options.deadline,
                progress=lambda done, total: bar.update(task, completed=done, total=total, visible=True),
            )
    except (ConfigError, VerifierError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.output}: {counts.total()} rows, " + ", ".join(f"{n} {status}" for status, n in counts.most_common())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
