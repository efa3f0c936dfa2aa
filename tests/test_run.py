"""What a run writes about its steps: it ends for none of what people merely look at."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from megatron_rlvr import run
from megatron_rlvr.config import Config, from_dict
from megatron_rlvr.records import read_rows
from tests.test_recorder import one_rank


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


def test_a_report_that_cannot_be_written_is_no_reason_for_a_finished_run_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    finished = run.Run.__new__(run.Run)  # of a run that is whole but for its models
    finished.config, finished.folder, finished.is_writer = from_dict(Config, {}), tmp_path, True
    finished.console = Console(file=io.StringIO())
    finished.trainer = SimpleNamespace(policy=SimpleNamespace(hf_weights=lambda: iter(())))
    monkeypatch.setattr(run, "save_hf", lambda weights, source, target: target.mkdir())
    (tmp_path / "metrics.jsonl").write_text("no row\n")
    finished._finish({"eval/pass@1": 0.5})
    assert (tmp_path / "hf").is_dir() and '"eval/pass@1": 0.5' in (tmp_path / "summary.json").read_text()
    assert "the report could NOT be written, and the run goes on" in caplog.text
