"""What the benches over several ranks share: their arguments, and the start of a rank."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable

from megatron_rlvr.launch.local import run_ranks

TIMEOUT = 600.0  # seconds that a rank waits for the others


def parser(description: str, dtype: str, **sizes: int) -> argparse.ArgumentParser:
    """--dtype and a whole number for each of ``sizes`` (one of them tp, the ranks), with these defaults."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    for name, value in sizes.items():
        made.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    made.add_argument("--dtype", choices=["bfloat16", "float32"], default=dtype, help="default: %(default)s")
    return made


def on_ranks(work: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Start this command again as ``options.tp`` ranks; on such a rank, join the others and do the work."""
    if "RANK" not in os.environ:
        return run_ranks([sys.executable, *sys.argv], options.tp, 0, {})
    warnings.simplefilter("ignore")  # Megatron lists what a machine without a GPU lacks
    from megatron_rlvr import platform
    from megatron_rlvr.distributed import groups

    platform.start_rank()
    groups.init(TIMEOUT)
    work(options)
    groups.destroy()
    return 0
