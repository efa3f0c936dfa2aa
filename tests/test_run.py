"""What a run writes about its steps: it ends for none of what people merely look at."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from megatron_rlvr import run, train
from megatron_rlvr.config import Config, ConfigError, from_dict
from megatron_rlvr.records import read_rows
from megatron_rlvr.run_folder import prepare_folder
from tests.test_recorder import one_rank

ROOT = Path(__file__).parents[1]


def test_a_record_or_a_report_that_cannot_be_written_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = from_dict(Config, {"logging": {"tensorboard": False}})
    monkeypatch.setattr(run, "REPORT_EVERY", 1)
    recording, _ = one_rank(2)
    with run.Records(config, tmp_path, str, 0) as records, caplog.at_level(logging.WARNING):
        records.write(1, {"reward/mean": 0.5}, [], recording)
        assert (tmp_path / "report.html").exists() and not caplog.records
        (tmp_path / "report.html").unlink()
        (tmp_path / "report.html").mkdir()
        (tmp_path / "tokens/step_2.new").mkdir()
        records.write(2, {"reward/mean": 0.5}, [], recording)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("could NOT be written, and the run goes on" in line for line in said)
    assert "the tokens of step 2" in said[0] and "the report" in said[1]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_tracker_that_does_not_start_leaves_no_run_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the same command, once that is mended, would be refused."""

    def refuse(**settings: object) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse, __spec__="there"))
    config = from_dict(Config, {"run": {"dir": str(tmp_path)}, "logging": {"wandb_project": "rlvr"}})
    with pytest.raises(ConfigError, match="W&B does not start"):
        run.Records(config, tmp_path, str, 0)
    assert prepare_folder(config) == tmp_path
    config.logging.wandb_project = ""
    with run.Records(config, tmp_path, str, 0), pytest.raises(ConfigError, match="already holds a run"):
        prepare_folder(config)


def test_a_report_that_cannot_be_written_is_no_reason_for_a_finished_run_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    finished = run.Run.__new__(run.Run)  # of a run that is whole but for its models
    finished.config, finished.folder, finished.is_writer = from_dict(Config, {}), tmp_path, True
    finished.console = Console(file=io.StringIO())
    finished.trainer = SimpleNamespace(policy=SimpleNamespace(hf_weights=lambda: iter(())))
    finished.checkpoints = SimpleNamespace(companions={"policy": {}})
    monkeypatch.setattr(run, "save_hf", lambda weights, companions, target: target.mkdir())
    (tmp_path / "metrics.jsonl").write_text("no row\n")
    finished._finish({"eval/pass@1": 0.5})
    assert (tmp_path / "hf").is_dir() and '"eval/pass@1": 0.5' in (tmp_path / "summary.json").read_text()
    assert "the report could NOT be written, and the run goes on" in caplog.text


def test_a_run_that_has_more_steps_behind_it_than_it_is_to_have_ends_before_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher looks at the newest checkpoint; what the ranks find may be an older one."""
    tree = {"run": {"dir": str(tmp_path), "resume": "must"}, "trainer": {"num_steps": 2}}
    resumed = object.__new__(run.Run)
    resumed.config, resumed.folder = from_dict(Config, tree), tmp_path
    resumed.trainer = SimpleNamespace(models={}, groups=None)  # type: ignore[assignment]
    monkeypatch.setattr(run, "newest_usable", lambda *arguments: (tmp_path / "checkpoints/step_3", []))
    with pytest.raises(ConfigError, match="trainer.num_steps=2, but .*step_3 has 3 steps behind it"):
        resumed._resume()


@pytest.mark.parametrize("writes", [True, False])
def test_the_watchdog_hears_of_every_tensor_of_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(run.watchdog, "beat", heard.append)
    monkeypatch.setattr(run, "save_hf", lambda weights, *folders: list(weights))
    monkeypatch.setattr(run, "build_report", lambda folder: folder / "report.html")
    ended = object.__new__(run.Run)
    ended.config, ended.folder, ended.is_writer, ended.console = Config(), tmp_path, writes, Console(quiet=True)
    policy = SimpleNamespace(hf_weights=lambda: ((str(number), torch.zeros(1)) for number in range(3)))
    ended.trainer = SimpleNamespace(policy=policy)  # type: ignore[assignment]
    ended.checkpoints = SimpleNamespace(companions={"policy": {}})  # type: ignore[assignment]
    ended._finish({})
    assert heard == ["export"] * 4


@pytest.mark.parametrize(
    ("raised", "said"),
    [("OSError('full')", "error on rank 0: OSError: full"), ("ConfigError('no room')", "error: no room")],
)
def test_a_run_that_ends_because_the_disk_is_full_says_so(tmp_path: Path, raised: str, said: str) -> None:
    """Its log is on that disk too."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank_0.log").symlink_to("/dev/full")
    code = (
        "import os, sys\nfrom megatron_rlvr import train\n"
        "from megatron_rlvr.config import Config, ConfigError, RunConfig\n"
        f"def ends(*_): raise {raised}\n"
        "train._run = ends\nos._exit(train._train(Config(run=RunConfig(dir=sys.argv[1])), 0))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert ended.returncode in (train.FAILURE, train.USER_ERROR) and said in ended.stdout


@pytest.mark.parametrize("full", [False, True])
def test_a_terminal_that_nobody_reads_any_more_or_that_is_full_ends_no_run(tmp_path: Path, full: bool) -> None:
    """As in: python -m megatron_rlvr.train ... | head -20"""
    code = (
        "import sys\nfrom pathlib import Path\nfrom rich.console import Console\nfrom megatron_rlvr import train\n"
        "console = Console(file=train._redirect_output(Path(sys.argv[1])))\n"
        "print(sys.stdin.read())\nfor _ in range(999): console.print('step', 'x' * 99)\nprint('the end', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    with open("/dev/full", "w") as disk:
        out = disk if full else subprocess.PIPE
        ended = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, cwd=ROOT)
        if ended.stdout:
            ended.stdout.close()
        ended.communicate(b"read to its end", timeout=120)
    assert ended.returncode == 0 and (tmp_path / "log").read_text() == "read to its end\nthe end\n"
