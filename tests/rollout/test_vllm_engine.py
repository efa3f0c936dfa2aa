"""A real vLLM engine on real ranks: what it samples, what it holds, and every way in which a sync can fail.

Starting an engine costs many seconds: engine_checks.py runs every check in one start per layout, each is a test here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from megatron_rlvr import platform
from megatron_rlvr.rollout.vllm_settings import prompt_settings, set_environment

ROOT = Path(__file__).resolve().parents[2]
CHECKS = re.findall(r"def (check_\w+)\(self", (ROOT / "tests/rollout/engine_checks.py").read_text())
LAYOUTS = {"qwen3-tied-tp2": ("qwen3", "tied", 2), "qwen2-untied-tp1": ("qwen2", "untied", 1)}
DEADLINE = 400.0  # seconds, on a machine with other work; 40 on an idle one


@pytest.fixture(scope="module")
def gpu_outcomes(tmp_path_factory) -> list[dict[str, str]]:
    return _launch(tmp_path_factory.mktemp("gpu"), *LAYOUTS["qwen2-untied-tp1"])


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, list[dict[str, str]]]:
    before = set(os.listdir("/dev/shm"))
    made = {name: _launch(tmp_path_factory.mktemp(name), *layout) for name, layout in LAYOUTS.items()}
    made["left in /dev/shm"] = sorted(set(os.listdir("/dev/shm")) - before)
    return made


def _launch(folder: Path, family: str, tied: str, tp: int) -> list[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="sockets-") as sockets:  # a path that is short enough for them
        return _outcomes(folder, family, tied, tp, {"VLLM_RPC_BASE_PATH": sockets})


def _outcomes(folder: Path, family: str, tied: str, tp: int, environment: dict[str, str]) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": tp, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1} | environment
    arguments = [sys.executable, "-m", "tests.rollout.engine_checks", str(folder), family, tied, str(tp)]
    logs = [folder / f"log-{rank}" for rank in range(tp)]
    ranks = []
    for rank in range(tp):
        own = {key: str(value) for key, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        with open(logs[rank], "w") as log:
            ranks.append(
                subprocess.Popen(
                    arguments, cwd=ROOT, env=os.environ | own, stdout=log, stderr=log, start_new_session=True
                )
            )
    try:
        deadline = time.monotonic() + DEADLINE
        codes = [rank.wait(timeout=deadline - time.monotonic()) for rank in ranks]
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
    assert codes == [0] * tp, "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((folder / f"outcome-{rank}.json").read_text()) for rank in range(tp)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("check", CHECKS)
def test_engine_on_a_gpu(gpu_outcomes, check):
    (outcome,) = gpu_outcomes
    assert outcome.get(check, "not reached") == "passed", outcome.get(check, "not reached")


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_engine_on_a_gpu is the same on one GPU")
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_engine(outcomes, layout, check):
    for rank, outcome in enumerate(outcomes[layout]):
        assert outcome.get(check, "not reached") == "passed", f"rank {rank}:\n{outcome.get(check, 'not reached')}"


def test_nothing_is_left_in_shared_memory(outcomes):
    assert "megatron-rlvr-" in outcomes["qwen3-tied-tp2"][0]["segments"]  # the two ranks did share some
    assert not [name for name in outcomes["left in /dev/shm"] if "megatron-rlvr" in name or name.startswith("psm_")]


def test_settings_of_the_users_own_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"VLLM_LOGGING_LEVEL": "WARNING"})
    set_environment()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "WARNING" and os.environ["VLLM_NO_USAGE_STATS"] == "1"


def test_a_long_prompt_goes_in_whole_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "has_gpu", lambda: False)
    for longest, tokens in ((100, 4096), (9000, 9000)):
        settings = prompt_settings(longest, max_running=4)
        assert settings == {"enable_chunked_prefill": False, "max_num_batched_tokens": tokens}
