"""Build or rebuild RUN/report.html: python tools/report.py RUN [RUN ...]"""

from __future__ import annotations

import argparse
import sys

from megatron_rlvr.report import build_report


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build report.html of one or more run folders from what they have logged."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, the one that holds metrics.jsonl")
    failed = 0
    for run in parser.parse_args().runs:
        try:
            print(build_report(run))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
