"""tools/evaluate.py with a real engine and a tiny model: every published benchmark, and the same whatever the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_real_data import save_byte_tokenizer
from tests.tiny import make_critic, make_folder

ROOT = Path(__file__).parents[2]
DEADLINE = 900.0  # seconds; minutes on two busy cores
SIZES = {"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500, "olympiadbench": 675, "minerva": 272, "gsm8k": 1319}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = make_folder(
        tmp_path_factory.mktemp("model"),
        vocab_size=257,
        num_hidden_layers=2,
        head_dim=32,
        max_position_embeddings=8192,
        eos_token_id=256,
    )
    save_byte_tokenizer(folder)
    return folder


def run(model: Path, output: Path, benchmarks: str, *flags: str) -> str:
    command = [sys.executable, "tools/evaluate.py", str(model), "--benchmarks", benchmarks, "--output", str(output)]
    command += ["--data", os.environ["MEGATRON_RLVR_DATA"] + "/eval", "--template", "raw", "--kv-cache-mib", "256"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def rows(output: Path, benchmark: str) -> list[dict]:
    lines = (output / "samples" / f"{benchmark}.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda row: (row["id"], row["sample"]))


@pytest.mark.real_data
@pytest.mark.slow
def test_all_seven_files_from_one_command(model: Path, tmp_path: Path) -> None:
    flags = ("--max-tokens", "16", "--critic", str(make_critic(model, tmp_path / "critic")))
    shown = run(model, tmp_path, ",".join(SIZES), *flags)
    results = json.loads((tmp_path / "results.json").read_text())["benchmarks"]
    assert {name: found["problems"] for name, found in results.items()} == SIZES
    for name, size in SIZES.items():
        samples = rows(tmp_path, name)
        assert len(samples) == size and len({row["id"] for row in samples}) == size
        assert all(1 <= row["tokens"] <= 16 and row["log_prob"] < 0 for row in samples)
        assert {row["status"] for row in samples} <= {"ok", "unparseable"}
        assert 0 <= results[name]["avg@1"]["low"] <= results[name]["avg@1"]["value"] <= results[name]["avg@1"]["high"]
        spreads = [row["head_std"] for row in samples]
        assert min(spreads) > 0 and min(spreads) <= results[name]["head_std"] <= max(spreads)
        assert results[name]["ppl_wrong"] > 1 and results[name]["title"].split()[0] in shown
    assert len({results[name]["head_std"] for name in SIZES}) == len(SIZES)
    again = run(model, tmp_path, ",".join(SIZES), *flags)
    assert "responses" not in again  # nothing was missing
    assert json.loads((tmp_path / "results.json").read_text())["benchmarks"] == results


@pytest.mark.real_data
@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch(model: Path, tmp_path: Path) -> None:
    """One at a time, a few, all together: the same tokens; the log-probs of a response in bfloat16 differ by 0.02."""
    found = []
    for batch, running in ((7, 1), (10, 4), (1000, 128)):
        output = tmp_path / str(batch)
        flags = ("--samples", "2", "--max-tokens", "32", "--batch", str(batch), "--max-running", str(running))
        run(model, output, "aime24", *flags)
        found.append(rows(output, "aime24"))
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert same.pop("log_prob") == pytest.approx(one["log_prob"], abs=0.1)
            assert same == {name: value for name, value in one.items() if name != "log_prob"}
