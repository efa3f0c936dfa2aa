"""What both vLLM engines, the one inside training and the one of an evaluation, say to vLLM and hear from it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from megatron_rlvr import platform
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import rule
from megatron_rlvr.rollout.engine import Request, Sample

_SETTINGS = {
    # In this process, so that tensors reach it by reference and its ranks can be torchrun's.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # Its workers start anew where it has any (an evaluation on several GPUs): this process may have threads by then.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


CPU_BLOCK = 128  # tokens; of vLLM's cache on a CPU
TOKENS_AT_A_TIME = 8192  # of prompts, on a GPU; vLLM's own choice is twice that on a large one, and so are its buffers


def set_environment() -> None:
    """What vLLM reads while it is imported; settings of the user's own stay."""
    os.environ.update({name: value for name, value in _SETTINGS.items() if name not in os.environ})


def check_head_dim(architecture: Architecture) -> None:
    """vLLM itself only fails at the first request. Raises ConfigError."""
    if platform.device().type != "cpu":
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    rule(
        architecture.head_dim in sizes,
        f"the model's head_dim={architecture.head_dim} is not one that vLLM computes on a CPU: {sizes}",
    )


def key_value_bytes(architecture: Architecture, tp: int, length: int, dtype: str) -> int:
    """Of a rank's cache for one sequence of ``length`` tokens, which vLLM keeps in whole blocks on a CPU.

    Of dtype auto, which vLLM may make half as wide as the folder says, it is the least there can be.
    """
    width = 4 if dtype == "float32" else 2
    tokens = -(-length // CPU_BLOCK) * CPU_BLOCK
    return architecture.kv_size_per_token(tp) * width * tokens


def memory_settings(
    kv_cache_mib: int, gpu_memory_utilization: float, longest: int, keys: tuple[str, str]
) -> dict[str, Any]:
    """vLLM's words for how much memory it may take; ``keys`` set a CPU's cache and the share of a GPU.

    ``longest``: bytes that one sequence may need of a CPU's cache. vLLM takes a share of the whole GPU, of which so
    much must be free when it starts (v1/worker/utils.py:716). Raises ConfigError where it is not, and for a cache that
    cannot hold a single sequence.
    """
    if platform.has_gpu():
        platform.give_back_cached_memory()
        free = platform.free_share()
        rule(
            gpu_memory_utilization <= free,
            f"{keys[1]}={gpu_memory_utilization:g} is the engine's share of the GPU, but only {free:.3f} is free "
            f"beside what is there already: set less, or make room",
        )
        return {"gpu_memory_utilization": gpu_memory_utilization}
    least = -(-longest // 2**20)
    rule(
        kv_cache_mib >= least,
        f"{keys[0]}={kv_cache_mib} MiB cannot hold the keys and values of one sequence of the greatest length: set at "
        f"least {least}, or allow shorter sequences",
    )
    return {"kv_cache_memory_bytes": kv_cache_mib << 20}


def prompt_settings(max_length: int, max_running: int) -> dict[str, Any]:
    """How many tokens vLLM takes at a time; on a CPU prompts of up to ``max_length`` go in whole.

    A seeded request whose prompt is cut ends vLLM there, because a CPU's random generator has no offset to set back
    (v1/worker/gpu_model_runner.py:3502).
    """
    if platform.has_gpu():
        return {"max_num_batched_tokens": max(TOKENS_AT_A_TIME, max_running)}
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(max_length, 4096)}


def generate(
    llm: Any, requests: list[Request], stop_ids: list[int], vocab_size: int, ended: Callable[[int], Any]
) -> list[Sample]:
    """One sample per request, in order; ``ended`` is told how many more have ended, as they do."""
    prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in requests]
    settings = [_sampling(request, stop_ids, vocab_size) for request in requests]
    outputs = llm.generate(prompts, settings, use_tqdm=_counting_bar(ended))
    return [_read_sample(output.outputs[0], request.top) for output, request in zip(outputs, requests, strict=True)]


def _sampling(request: Request, stop_ids: list[int], vocab_size: int) -> Any:
    """A request in vLLM's words."""
    from vllm import SamplingParams

    return SamplingParams(
        seed=request.seed,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        stop_token_ids=stop_ids,
        ignore_eos=True,  # the end tokens are all in stop_token_ids
        logprobs=min(request.top, vocab_size),  # 0: of the sampled token alone
        detokenize=False,
        skip_clone=True,  # made for this one request: vLLM need not copy it deeply
    )


def _counting_bar(ended: Callable[[int], Any]) -> type[tqdm]:
    """What vLLM takes for its progress bar: it shows nothing and passes on how many more have ended."""

    class Bar(tqdm):
        monitor_interval = 0  # no thread beside processes that fork

        def __init__(self, *rows: Any, **options: Any) -> None:
            # Without rows it counts responses, and vLLM reads its clock; with them it walks through the requests.
            super().__init__(*rows, **options | {"file": io.StringIO(), "disable": bool(rows)})

        def update(self, n: float | None = 1) -> bool | None:
            ended(int(n or 0))
            return super().update(n)

    return Bar


def _read_sample(completion: Any, top: int) -> Sample:
    """What vLLM answers to a request with that ``top``."""
    ids = list(completion.token_ids)
    log_probs = [step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)]
    if completion.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"the engine ended a response with {completion.finish_reason!r} instead of stop or length")
    if not top:
        return Sample(ids, log_probs, completion.finish_reason)
    most = [sorted((item.logprob for item in step.values()), reverse=True) for step in completion.logprobs]
    return Sample(ids, log_probs, completion.finish_reason, most)
