"""Exported folders in vLLM: transformers' greedy tokens, for every family, tied and untied; experts reloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from megatron_rlvr.weights.convert_export import export_megatron
from megatron_rlvr.weights.convert_import import import_hf
from tests.weights.greedy_tokens import NEW, PROMPTS
from tests.weights.tiny_models import CONFIGS, END, save_model

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def greedy(mode: str, *folders: Path) -> list[list[list[int]]]:
    command = [sys.executable, "-m", "tests.weights.greedy_tokens", mode, *map(str, folders)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def agrees(model: torch.nn.Module, said: list[list[int]]) -> bool:
    """Whether each token is the most probable one after what comes before it."""
    for prompt, response in zip(PROMPTS, said, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        if logits.argmax(-1).tolist() != response:
            return False
    return True


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_vllm_says_what_transformers_says(family: str, tied: bool, tmp_path: Path) -> None:
    source, megatron, target = (tmp_path / name for name in ("hf", "megatron", "back"))
    save_model(source, family, tied)
    import_hf(source, megatron, tp=2)
    export_megatron(megatron, target)
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    (said,) = greedy("folder", target)
    assert [len(response) for response in said] == [NEW] * len(PROMPTS)
    assert agrees(model, said)


def test_the_engine_takes_new_experts(tmp_path: Path) -> None:
    """On a CPU a reload alone leaves the experts' kernels with the weights they were made of."""
    folders = [tmp_path / str(seed) for seed in range(3)]
    models = [save_model(folder, "qwen3_moe", tied=False, seed=seed) for seed, folder in enumerate(folders)]
    import_hf(folders[0], tmp_path / "megatron")
    said = greedy("engine", tmp_path / "megatron", *folders)
    for model, responses, earlier in zip(models, said, [None, *said], strict=False):
        responses = [[*response[: response.index(END)], END] if END in response else response for response in responses]
        assert agrees(model, responses)
        assert earlier is None or not agrees(model, earlier)  # else the line above proves nothing
