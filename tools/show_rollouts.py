"""A step's responses token by token, as a page: python tools/show_rollouts.py RUN --step N"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_rlvr.pages.rollout_page import build_rollout_page
from megatron_rlvr.token_records import recorded_steps


def main() -> int:
    parser = argparse.ArgumentParser(description="Write RUN/tokens/step_N.html: what the flight recorder kept.")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, the one that holds tokens/")
    parser.add_argument("--step", type=int, metavar="N", help="default: the newest recorded one")
    options = parser.parse_args()
    step = options.step if options.step is not None else max(recorded_steps(options.run), default=0)
    try:
        print(build_rollout_page(options.run, step))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
