"""Two runs in one folder: the second is refused, or waits for the first one's end where it goes on with it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from megatron_rlvr.config import ConfigError
from megatron_rlvr.run_folder import hold


def test_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with hold(folder), pytest.raises(ConfigError, match="a run is going on in .*run: wait for its end"):
        hold(folder)
    hold(folder).close()  # the lock went with its file


def test_a_resumed_run_waits_for_the_end_of_the_one_before(tmp_path: Path) -> None:
    first = hold(tmp_path)
    threading.Timer(0.5, first.close).start()
    hold(tmp_path, patience=30.0).close()
    assert first.closed


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make the run's folder .*; set run.dir"):
        hold(tmp_path / "file" / "run")
