"""A vLLM engine of its own for a model on disk: what an evaluation samples with. No Megatron, no process group of ours.

sampler = Sampler("/models/Qwen3-4B", 5120, dtype="auto", tp=1, max_running=256, ...)
samples = sampler.generate([Request(prompt_token_ids=[3, 11, 5], seed=7, max_tokens=4096, temperature=0.6, top_p=0.95)])
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rlvr import platform
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.rollout.engine import Request, Sample, stop_token_ids
from megatron_rlvr.rollout.vllm_settings import (
    check_head_dim,
    generate,
    key_value_bytes,
    memory_settings,
    prompt_settings,
    set_environment,
)


class Sampler:
    """The model in a Hugging Face folder, on ``tp`` GPUs or on the CPU; log-probs are the model's own at temperature 1.

    ``max_length`` is in tokens, prompt and response; ``max_running`` how many responses are decoded together;
    ``kv_cache_mib`` is a CPU's cache, ``gpu_memory_utilization`` the share of a GPU. Raises ConfigError for a model
    that cannot be run so.
    """

    def __init__(
        self,
        path: str | Path,
        max_length: int,
        *,
        dtype: str,
        tp: int,
        max_running: int,
        kv_cache_mib: int,
        gpu_memory_utilization: float,
    ) -> None:
        architecture = Architecture.from_folder(path)
        architecture.check_engine_layout(tp, key="--tp")
        architecture.check_length(max_length, keys="the longest prompt + --max-tokens")
        self._stop_ids, self._vocab_size = stop_token_ids(path), architecture.vocab_size
        set_environment()
        platform.spare_vllm_small_compiles()
        check_head_dim(architecture)
        from vllm import LLM  # after the settings above, which vLLM reads while it is imported

        self._llm: Any = LLM(
            model=str(path),
            dtype=dtype,
            tensor_parallel_size=tp,
            max_model_len=max_length,
            max_num_seqs=max_running,
            # Those of the model itself: perplexities do not depend on the temperature that was sampled with.
            logprobs_mode="raw_logprobs",
            generation_config="vllm",  # no sampling defaults that hide in the model's folder
            skip_tokenizer_init=True,
            enforce_eager=not platform.has_gpu(),  # compiling takes longer than a small evaluation
            seed=0,
            **prompt_settings(max_length, max_running),
            **memory_settings(
                kv_cache_mib,
                gpu_memory_utilization,
                key_value_bytes(architecture, tp, max_length, dtype),
                ("--kv-cache-mib", "--gpu-memory"),
            ),
        )

    def generate(self, requests: list[Request], ended: Callable[[int], Any] = lambda count: None) -> list[Sample]:
        """One sample per request, in order; ``ended`` is told how many more have ended, as they do."""
        return generate(self._llm, requests, self._stop_ids, self._vocab_size, ended)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
