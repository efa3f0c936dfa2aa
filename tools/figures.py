"""The papers' figures for one run or several: python tools/figures.py RUN [RUN ...] --output FOLDER"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_rlvr.pages.figures import FIGURES, write_figures


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write the figures of the Lp-Reg and CDE papers as SVG and PNG.",
        epilog="\n".join(f"{name}: {draw.__doc__}" for name, draw in FIGURES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder; a line each where there are several")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: figures/ in the first run's folder")
    options = parser.parse_args()
    try:
        written = write_figures(options.runs, options.output or Path(options.runs[0]) / "figures")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, paths in written.items():
        print(" ".join(map(str, paths)) if paths else f"{name}: no run has what it shows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
