"""vLLM inside the training processes: its ranks are ours, its weights come from the policy, nothing else moves.

The engine starts with made-up weights and refuses to sample until a sync has been proven (weights/weight_sync.py).
"""

from __future__ import annotations

import logging
import os
import random
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor

from megatron_rlvr import platform
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.reduce import broadcast_object
from megatron_rlvr.rollout.engine import EngineNotReady, Request, Sample, stop_token_ids
from megatron_rlvr.rollout.vllm_settings import (
    check_head_dim,
    generate,
    key_value_bytes,
    memory_settings,
    prompt_settings,
    set_environment,
)

log = logging.getLogger(__name__)

WEIGHTS, CACHE = "weights", "kv_cache"  # what vLLM calls the parts of its memory that sleep and wake by themselves


class VllmEngine:
    """This rank's part of its replica: rollout.tp neighbouring ranks hold one copy of the model."""

    def __init__(self, config: Config, groups: ParallelGroups, most_log_probs: int = 0) -> None:
        """``most_log_probs``: the largest ``top`` that a request may ask for."""
        architecture = Architecture.from_folder(config.model.path)
        architecture.check_engine_layout(config.rollout_tp)
        architecture.check_length(config.longest)
        self.tp_size, self.tp_rank = config.rollout_tp, groups.rank % config.rollout_tp
        self.ready = False
        self._stop_ids = stop_token_ids(config.model.path)
        self._vocab_size = architecture.vocab_size
        job = broadcast_object(f"megatron-rlvr-{uuid.uuid4().hex[:12]}", 0, groups.world)
        set_environment()
        self._stream = platform.EngineStream()
        with self._stream.entered(), _process_unchanged():
            platform.spare_vllm_small_compiles()
            with platform.private_shared_memory(job):
                check_head_dim(architecture)
                self._llm = _start(config, architecture, most_log_probs)
        self._model: Any = self._llm.apply_model(lambda model: model)[0]
        self._modules = dict(self._model.named_modules())
        self._can_sleep = self._llm.llm_engine.model_config.enable_sleep_mode
        self._asleep: set[str] = set()  # of WEIGHTS and CACHE, those that give their memory to the training phases
        self._sleep()  # a run that goes on loads its checkpoint first

    def generate(self, requests: list[Request], ended: Callable[[int], Any] = lambda count: None) -> list[Sample]:
        """One sample per request, in order; collective within the replica. Raises EngineNotReady."""
        if not self.ready:
            raise EngineNotReady("the engine's weights are not proven to be the policy's: push them first")
        samples: list[Sample] = []
        with self._stream.entered(), _process_unchanged():
            if requests:
                self._wake(WEIGHTS, CACHE)
                samples = generate(self._llm, requests, self._stop_ids, self._vocab_size, ended)
            self._sleep()  # also where there was nothing to do: a push leaves the weights awake
        return samples

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Stream (Hugging Face name, whole tensor) into vLLM, which fuses and cuts them itself; leaves it not ready."""
        self.ready = False
        with self._stream.entered(), _process_unchanged():
            # The cache stays away: whole tensors on their way here need its room beside the policy's training state.
            self._sleep()
            self._wake(WEIGHTS)
            platform.forget_expert_kernels(self._model)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            # Cached prefixes hold keys and values of the old weights, and a reload keeps them.
            self._llm.reset_prefix_cache()

    def parameter_names(self) -> set[str]:
        """Every parameter, tied ones under both names."""
        return {name for name, _ in self._model.named_parameters(remove_duplicate=False)}

    def held(self, parameter: str, columns: slice) -> Tensor:
        """What the engine computes with: [rows, columns] of a matrix, all of a vector. Raises KeyError.

        On a CPU a linear layer multiplies with a repacked copy that no attribute shows: the product with columns of the
        identity reads it back, exactly (each sum has one term that is not zero).
        """
        path, _, leaf = parameter.rpartition(".")
        module = self._modules[path]
        tensor = getattr(module, leaf)
        if self.is_plain(parameter):
            return tensor.detach() if tensor.dim() == 1 else tensor.detach()[:, columns]
        identity = torch.zeros(columns.stop - columns.start, self._columns(module), dtype=self._model_dtype)
        identity[:, columns].fill_diagonal_(1)
        return module.cpu_linear(identity, tensor, None).T

    def is_plain(self, parameter: str) -> bool:
        """All but a CPU's linear layers; the embedding has such a copy too, but looks its rows up in the weight."""
        path, _, leaf = parameter.rpartition(".")
        is_repacked = getattr(self._modules[path], "cpu_linear", None) is not None
        return not is_repacked or leaf != "weight" or path.endswith("embed_tokens")

    def close(self) -> None:
        """End vLLM, and with it the default process group: the last act of a run."""
        self._llm.llm_engine.engine_core.shutdown()

    @property
    def _model_dtype(self) -> torch.dtype:
        return self._llm.llm_engine.model_config.dtype

    def _columns(self, module: Any) -> int:
        return getattr(module, "input_size_per_partition", None) or module.embedding_dim

    def _sleep(self) -> None:
        """Give the accelerator's memory to the training phases; the weights wait in host memory."""
        if self._can_sleep and WEIGHTS not in self._asleep:
            self._llm.sleep(level=1)
            self._asleep = {WEIGHTS, CACHE}

    def _wake(self, *parts: str) -> None:
        if asleep := [part for part in parts if part in self._asleep]:
            platform.give_back_cached_memory()  # of the training phases
            self._llm.wake_up(tags=asleep)
            self._asleep -= set(asleep)


def _start(config: Config, architecture: Architecture, most_log_probs: int) -> Any:
    from vllm import LLM  # after the settings above, which vLLM reads while it is imported
    from vllm.platforms import current_platform

    return LLM(
        model=config.model.path,
        load_format="dummy",  # every weight comes from the policy, through one door
        dtype=config.model.dtype,
        tensor_parallel_size=config.rollout_tp,
        distributed_executor_backend="external_launcher",
        max_model_len=config.longest,
        max_num_seqs=config.rollout.max_running,
        # Of the distribution that is sampled from, temperature included, as the policy recomputes them.
        logprobs_mode="processed_logprobs",
        max_logprobs=most_log_probs,
        generation_config="vllm",  # no sampling defaults that hide in the model's folder
        skip_tokenizer_init=True,
        enforce_eager=not platform.has_gpu(),  # compiling takes longer than a small run
        enable_sleep_mode=current_platform.is_sleep_mode_available(),
        seed=0,
        **prompt_settings(config.longest, config.rollout.max_running),
        **memory_settings(
            config.rollout.kv_cache_mib,
            config.rollout.gpu_memory_utilization,
            key_value_bytes(architecture, config.rollout_tp, config.longest, config.model.dtype),
            ("rollout.kv_cache_mib", "rollout.gpu_memory_utilization"),
        ),
    )


@contextmanager
def _process_unchanged() -> Iterator[None]:
    """vLLM reseeds and draws from the process's random streams and rewrites its environment: undo both."""
    environment = {name: os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LD_PRELOAD")}
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    device = platform.device()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)
            for name, value in environment.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
