"""What a run was made with: one line a start, with the versions that are installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_rlvr import environment


def test_each_start_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "megatron_rlvr.train", "a.yaml"])
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    environment.record_start(tmp_path, {"lp_reg": {"rho": 0.02}})
    monkeypatch.delenv("SLURM_JOB_ID")
    environment.record_start(tmp_path, {})
    first, second = (json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines())
    assert first["slurm"] == {"SLURM_JOB_ID": "17"} and second["slurm"] == {}
    assert first["exploration"] == {"lp_reg": {"rho": 0.02}} and second["exploration"] == {}
    assert first["versions"]["torch"] == torch.__version__ and "megatron_rlvr" in first["versions"]
    assert first["command"] == [sys.executable, "-m", "megatron_rlvr.train", "a.yaml"]
    assert environment.last_start(tmp_path) == second
    for left in ("", "{broken"):
        (tmp_path / "starts.jsonl").write_text(left)
        assert environment.last_start(tmp_path) == {}
    assert environment.last_start(tmp_path / "absent") == {}


def test_the_commit_is_gits_own_and_empty_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if head.returncode == 0:
        assert head.stdout.startswith(environment.commit().removesuffix("+"))
        checkout, git = tmp_path / "checkout", ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
        checkout.mkdir()
        (checkout / "code.py").write_text("1")
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
            subprocess.run([*git, *command], cwd=checkout, check=True)
        monkeypatch.setattr(environment, "__file__", str(checkout / "code.py"))
        clean = environment.commit()
        (checkout / "code.py").write_text("two")
        assert len(clean) == 12 and environment.commit() == f"{clean}+"
    monkeypatch.setenv("PATH", "")
    assert environment.commit() == ""
