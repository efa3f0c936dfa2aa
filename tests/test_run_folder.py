"""Two runs in one folder: the second is refused, waits for the first one's end to go on with it, or takes its place."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from megatron_rlvr.config import Config, ConfigError, RunConfig
from megatron_rlvr.run_folder import hold, prepare_folder


def test_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with (
        hold(folder),
        pytest.raises(ConfigError, match="another run is going on in .*run: wait for its end, or set another run.dir"),
    ):
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


def test_a_deletion_that_was_killed_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else checkpoints of the run before would stay beside those of the new one, and be taken for its newest."""
    config = Config(run=RunConfig(dir=str(tmp_path), overwrite=True))
    (tmp_path / "config.yaml").write_text("name: earlier")
    (tmp_path / "checkpoints" / "step_200").mkdir(parents=True)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(shutil, "rmtree", killed)
        prepare_folder(config)
    assert (tmp_path / "checkpoints" / "step_200").exists()
    prepare_folder(config)
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("rank", ["", "0"])
def test_an_earlier_run_is_replaced_but_not_the_logs_of_ranks_that_have_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    """A launcher prepares the folder before it starts ranks; under torchrun or srun rank 0 does, beside the others."""
    monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "logs").mkdir()
    (tmp_path / "wandb").mkdir()
    for name in ("config.yaml", "metrics.jsonl", "wandb/latest-run", "logs/rank_1.log"):
        (tmp_path / name).write_text("earlier")
    prepare_folder(Config(run=RunConfig(dir=str(tmp_path), overwrite=True)))
    left = ["logs", "logs/rank_1.log"] if rank else ["logs"]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == left
