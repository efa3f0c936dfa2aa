"""Build or rebuild RUN/report.html, and compare runs: python tools/report.py RUN [RUN ...]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_rlvr.pages.comparison import build_comparison
from megatron_rlvr.pages.report import build_report


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build report.html of run folders from what they have logged; of several, comparison.html too."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run folder, with metrics.jsonl in it")
    parser.add_argument(
        "--comparison", type=Path, metavar="FILE", help="default: comparison.html in the folder of the first run's"
    )
    options = parser.parse_args()
    target = options.comparison or options.runs[0].resolve().parent / "comparison.html"
    built = [attempt(partial(build_report, run)) for run in options.runs]
    if len(options.runs) > 1 and all(built):
        built.append(attempt(lambda: build_comparison(options.runs, target)))
    return 0 if all(built) else 1


def attempt(build: Callable[[], Path]) -> bool:
    """Print what was built, or why it was not."""
    try:
        print(build())
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
