"""The ranks of one machine end together: with real processes that know nothing of training."""

from __future__ import annotations

import sys
import time

import pytest

from megatron_rlvr.launch.local import run_ranks


def ranks(body: str, count: int = 2) -> int:
    script = f"import os, sys, time\nrank = int(os.environ['RANK'])\n{body}"
    return run_ranks([sys.executable, "-c", script], count, port=0, extra={})


def test_every_rank_knows_its_place() -> None:
    places = "assert (os.environ['WORLD_SIZE'], os.environ['EXTRA']) == ('3', 'yes') and rank in (0, 1, 2)"
    assert (
        run_ranks(
            [sys.executable, "-c", f"import os\nrank = int(os.environ['RANK'])\n{places}"], 3, 0, {"EXTRA": "yes"}
        )
        == 0
    )


def test_a_rank_that_fails_ends_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever it is, and however it ends: the launcher neither waits for the rest nor hides the code."""
    for victim in (0, 1):
        started = time.monotonic()
        assert ranks(f"sys.exit(3) if rank == {victim} else time.sleep(300)") == 3
        assert ranks(f"os.kill(os.getpid(), 9) if rank == {victim} else time.sleep(300)") == -9
        assert time.monotonic() - started < 60
        assert capsys.readouterr().err == f"error: rank {victim} was killed by SIGKILL\n"
