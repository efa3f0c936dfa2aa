"""Mistakes: each is one clear line and a non-zero exit, and most are said before any rank starts."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from megatron_rlvr.run_folder import hold


@pytest.fixture
def listening_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def refused(train, *overrides: str) -> str:
    output = train(*overrides, code=2)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert "Traceback" not in output
    return errors[0]


def test_mistakes_in_the_config(train, countdown: Path, tmp_path: Path, listening_port: int) -> None:
    folder = f"run.dir={tmp_path / 'run'}"
    error = refused(train, "rolout.temperature=1", folder)
    assert "unknown key 'rolout'" in error and "did you mean 'rollout'" in error
    assert "parallel.tp=3" in refused(train, "parallel.tp=3", folder)
    assert "nowhere" in refused(train, "model.path=nowhere", "prepare=", folder)
    error = refused(train, "verifier=countdwn", folder)
    assert "unknown verifier 'countdwn'; did you mean 'countdown'" in error
    error = refused(train, "exploration.lp_reg.roh=0.1", folder)
    assert "exploration.lp_reg.roh" in error and "exploration.lp_reg.rho" in error
    assert f"run.port={listening_port} is in use" in refused(train, f"run.port={listening_port}", folder)
    assert not (tmp_path / "run").exists()


def test_unsupported_model_family(train, countdown: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(countdown / "model", model)
    tree = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**tree, "model_type": "mamba"}))
    error = refused(train, f"model.path={model}", f"run.dir={tmp_path / 'run'}")
    assert "mamba" in error and "qwen3" in error


def test_folder_that_holds_a_run(train, countdown: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("name: earlier\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    error = refused(train, f"run.dir={folder}")
    assert "already holds a run" in error and "run.resume=auto" in error
    with hold(folder):  # as a run does that has not written anything yet
        assert f"another run is going on in {folder}" in refused(train, f"run.dir={folder}", "run.overwrite=true")
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert "holds no checkpoint" in refused(train, f"run.dir={folder}", "run.resume=must")


def test_rows_that_cannot_be_used(train, countdown: Path, tmp_path: Path) -> None:
    """Strict data stops at the row; otherwise it is counted, named and dropped."""
    good = (countdown / "train.jsonl").read_text().splitlines()[:20]
    without_answer = json.dumps({"prompt": "1,2,3=6>"})
    too_long = json.dumps({"prompt": "1" * 60, "answer": {"numbers": [1, 2, 3], "target": 6}})
    for name, row, reason in (("answer", without_answer, "answer"), ("long", too_long, "max_prompt_length")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join([*good[:3], row, *good[3:]]) + "\n")
        error = refused(train, f"data.path={path}", "data.strict=true", f"run.dir={tmp_path / name}")
        assert f"{path.name} row 4" in error and reason in error
    both = tmp_path / "both.jsonl"
    both.write_text("\n".join([*good, without_answer, too_long]) + "\n")
    output = train(f"data.path={both}", "trainer.num_steps=1", f"run.dir={tmp_path / 'both'}")
    assert "20 of 22 rows are prompts" in output, output
    assert "no answer" in output and "longer than data.max_prompt_length=16" in output, output
