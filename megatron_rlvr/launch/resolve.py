"""What a job script asks about a config: python -m megatron_rlvr.launch.resolve CONFIG key=value ... [--shell]

Prints the resolved config, byte for byte what the run writes to RUN/config.yaml; with --shell what a shell evaluates:
NAME, RUN_DIR, RANKS. Needs PyYAML and nothing else, so it answers on a login node. A mistake is one line and code 2.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from megatron_rlvr.config import Config, ConfigError, as_yaml, load_config


def main() -> int:
    parser = argparse.ArgumentParser(description="Print the resolved config, or what a job script needs to know of it.")
    parser.add_argument("config", help="YAML file; see examples/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    parser.add_argument("--shell", action="store_true", help="print NAME, RUN_DIR and RANKS as assignments")
    options = parser.parse_args()
    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(assignments(config) if options.shell else as_yaml(config), end="")
    return 0


def assignments(config: Config) -> str:
    """NAME, RUN_DIR and RANKS, a line each, quoted for a shell."""
    values = {"NAME": config.name, "RUN_DIR": str(config.run_dir), "RANKS": str(config.world_size)}
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


if __name__ == "__main__":
    sys.exit(main())
