"""What vLLM says, greedily, as JSON on the last line: python -m tests.weights.greedy_tokens folder|engine FOLDER ...

folder: one list per FOLDER as vLLM loads it. engine: the rollout engine of the first FOLDER, which may be a Megatron
folder, and which takes the weights of each of the others in turn.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from safetensors.torch import load_file

PROMPTS = [[5, 6, 7, 8], [9, 10], [20, 21, 22, 23, 24, 25, 26]]
NEW = 12  # tokens


def of_folder(folder: str) -> list[list[int]]:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, kv_cache_memory_bytes=16 << 20,
        max_model_len=64, disable_log_stats=True,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def of_engine(folders: list[str]) -> list[list[list[int]]]:
    from megatron_rlvr import platform
    from megatron_rlvr.config import Config, DataConfig, ModelConfig, RolloutConfig
    from megatron_rlvr.distributed import groups
    from megatron_rlvr.distributed.groups import ParallelGroups
    from megatron_rlvr.processes import free_port
    from megatron_rlvr.rollout.engine import Request
    from megatron_rlvr.rollout.vllm_engine import VllmEngine

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    platform.start_rank()
    groups.init(timeout_seconds=60)
    config = Config(
        model=ModelConfig(path=folders[0], dtype="float32"),
        rollout=RolloutConfig(tp=1, max_response_length=NEW, kv_cache_mib=16),
        data=DataConfig(max_prompt_length=16),
    )
    engine, said = VllmEngine(config, ParallelGroups.single()), []
    for folder in folders[1:]:
        engine.load_weights(load_file(Path(folder) / "model.safetensors").items())
        engine.ready = True
        samples = engine.generate([Request(prompt, 1, NEW, 0.0) for prompt in PROMPTS])
        said.append([sample.response_ids for sample in samples])
    engine.close()
    return said


if __name__ == "__main__":
    mode, folders = sys.argv[1], sys.argv[2:]
    print(json.dumps(of_engine(folders) if mode == "engine" else [of_folder(folder) for folder in folders]))
