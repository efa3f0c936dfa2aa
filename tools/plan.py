"""Whether a config fits, and what it will take, before anything starts:

    python tools/plan.py CONFIG [key=value ...] --gpus N [--gpu h100] [--json]

Exit code 0: it fits, or the run has yet to make its model; 2: it does not fit, and the
fix is named. Needs neither torch nor a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys

from megatron_rlvr.config import ConfigError
from megatron_rlvr.planner.devices import DEVICES
from megatron_rlvr.planner.plan import make_plan
from megatron_rlvr.planner.shapes import NotMadeYet
from megatron_rlvr.planner.text import as_text


def main() -> int:
    parser = argparse.ArgumentParser(description="Predict memory, time and cost of a run before it starts.")
    parser.add_argument("config", help="YAML file; see examples/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for training")
    parser.add_argument("--gpus", type=int, required=True, help="ranks in all; with --gpu cpu of this machine")
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(DEVICES)}; default: %(default)s")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="of a node; default: 8")
    parser.add_argument("--prompt-tokens", type=float, default=0, help="mean; default: an eighth of the longest")
    parser.add_argument("--response-tokens", type=float, default=0, help="mean; default: half of the longest")
    parser.add_argument("--json", action="store_true", help="the plan as one JSON object")
    options = parser.parse_intermixed_args()
    try:
        plan = make_plan(
            options.config,
            options.overrides,
            options.gpus,
            options.gpu,
            options.prompt_tokens,
            options.response_tokens,
            options.gpus_per_node,
        )
    except NotMadeYet as error:
        print(json.dumps({"fits": None, "problems": [str(error)]}) if options.json else f"nothing to plan: {error}")
        return 0
    except ConfigError as error:
        print(json.dumps({"fits": False, "problems": [str(error)]}) if options.json else f"error: {error}")
        return 2
    print(json.dumps(plan.to_dict()) if options.json else as_text(plan))
    return 0 if plan.fits else 2


if __name__ == "__main__":
    sys.exit(main())
