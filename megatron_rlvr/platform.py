"""The one file that knows whether there is a GPU, and the one file that adjusts anybody else's code.

megatron-core 0.16.1 is written for CUDA, yet its dense training path is exact on a CPU once a handful of device
questions are answered differently. Those answers live here, each with its reason and the upstream line, and only
for the duration of ``megatron_calls()``: outside of it everybody sees the real torch.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.util
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils._device  # torch itself imports it only when a tensor is built under `with device`

from megatron_rlvr.config_reading import rule


def has_gpu() -> bool:
    """Whether this process computes on a CUDA GPU."""
    return torch.cuda.is_available()


def gpus() -> int:
    """How many GPUs this process sees; it computes on number LOCAL_RANK."""
    return torch.cuda.device_count() if has_gpu() else 0


def device() -> torch.device:
    """The device of this rank: its own GPU under torchrun's LOCAL_RANK, else the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if has_gpu() else torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend that moves tensors of ``device()``."""
    return "cuda:nccl,cpu:gloo" if has_gpu() else "gloo"


def has_transformer_engine() -> bool:
    """Whether the Transformer Engine layer spec is used; never on a CPU, where importing it raises."""
    return has_gpu() and importlib.util.find_spec("transformer_engine") is not None


def has_packed_attention(dtype: torch.dtype) -> bool:
    """Whether Transformer Engine computes packed responses without a matrix of all tokens by all tokens.

    Its fused kernels do from Hopper on (common/fused_attn/fused_attn.cpp:420), flash-attn elsewhere, neither of them in
    float32 (pytorch/attention/dot_product_attention/utils.py:599).
    """
    if not has_transformer_engine() or dtype == torch.float32:
        return False
    return torch.cuda.get_device_capability() >= (9, 0) or importlib.util.find_spec("flash_attn") is not None


def has_apex_weight_gradient_kernel() -> bool:
    """Whether NVIDIA apex's fused weight-gradient extension is there (megatron/core/tensor_parallel/layers.py:924)."""
    return has_gpu() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def has_triton() -> bool:
    """Whether Triton kernels run on a GPU here."""
    return has_gpu() and importlib.util.find_spec("triton") is not None


def interprets_triton() -> bool:
    """Whether Triton kernels run on the CPU, by its interpreter: slowly, for tests. Triton asks when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def memory_in_use() -> int:
    """Bytes: what this rank's GPU holds, everybody's on it; without one, the most that this process has held."""
    if has_gpu():
        free, total = torch.cuda.mem_get_info()
        return total - free
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def block_elements() -> int:
    """Elements to work on at a time where operations run one by one: what a CPU's cache holds, or what fills a GPU."""
    return 1 << 26 if has_gpu() else 1 << 16


def logits_block_elements() -> int:
    """Logits that are held at a time where all of them never are: enough rows for matrix products at full speed.

    Of a vocabulary of 152,000 that is 440 rows on a GPU. An H100 computes 990e12 a second in bf16 and reads 3.35e12
    bytes, so that with fewer than 300 rows it would wait for the weight.
    """
    return 1 << 26 if has_gpu() else 1 << 24


def give_back_cached_memory() -> None:
    """Return to the GPU what torch's allocator keeps of freed tensors; the engine's memory is not that allocator's."""
    if has_gpu():
        torch.cuda.empty_cache()


def free_share() -> float:
    """Of this process's GPU, the share that nobody holds; 1 where it has not begun to use one."""
    if not torch.cuda.is_initialized():
        return 1.0
    free, total = torch.cuda.mem_get_info()
    return free / total


def set_cuda_environment() -> None:
    """What CUDA's libraries read when they start; call it before imports that may start them. Users' settings stay."""
    # One queue to the GPU: Megatron's tensor-parallel sends start before the products that they overlap with
    # (tensor_parallel/layers.py:526).
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # float32 is float32: Transformer Engine multiplies it in TF32 (common/gemm/cublaslt_gemm.cu:445), off by 3e-4.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")


def start_rank() -> None:
    """Settings of a rank's process, before any tensor is made. Raises ConfigError: a rank without a GPU of its own."""
    set_cuda_environment()
    spare_attention_plans()
    # Each group of ranks is a mesh of sockets: of a hundred ranks more than the 1,024 files that are usually allowed.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if has_gpu():
        place = device().index
        rule(
            place < gpus(),
            f"LOCAL_RANK={place}, but this process sees {gpus()} GPU(s): start no more ranks on a node than it has, "
            f"and let each see all of them",
        )
        torch.cuda.set_device(place)
    else:
        # Two ranks with two threads each on two cores spin against one another and run six times slower.
        torch.set_num_threads(1)
        # torch caches the constructors that `with torch.device(...)` covers at the first use. Were that use inside
        # megatron_calls(), transformers would later build its rotary table from uninitialised memory.
        torch.utils._device._device_constructors()


def spare_attention_plans() -> None:
    """Keep torch's attention from cuDNN, its first choice from Hopper on (transformers/cuda/sdp_utils.cpp).

    It builds a plan for each shape of padded responses, which hardly ever comes again, and keeps them all.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


class EngineStream:
    """The CUDA stream that vLLM computes on; without a GPU there is none.

    vLLM leaves the process on another stream than it found, from its first graph or tensor-parallel group on
    (utils/torch_utils.py:837), and remembers which. The gradients of a policy that was built before belong to the
    stream before: mixed, each parameter's would wait for both.
    """

    def __init__(self) -> None:
        self._own: Any = None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """vLLM's stream in here, and behind it the one from before; each goes on where the other has come to."""
        if not has_gpu():
            yield
            return
        before = torch.cuda.current_stream()
        _go_on(before, self._own or before)
        try:
            yield
        finally:
            self._own = torch.cuda.current_stream()
            _go_on(self._own, before)


def _go_on(left: Any, entered: Any) -> None:
    if left != entered:
        entered.wait_stream(left)
        torch.cuda.set_stream(entered)


_CPU = torch.device("cpu")
_depth = 0


@contextlib.contextmanager
def megatron_calls() -> Iterator[None]:
    """Run Megatron in here: on a CPU its questions to CUDA are answered, on a GPU nothing changes. Re-entrant."""
    global _depth
    if has_gpu():
        yield
        return
    with contextlib.ExitStack() as stack:
        if _depth == 0:
            for owner, name, replacement in _cpu_answers():
                stack.callback(*_restore(owner, name))
                setattr(owner, name, replacement)
        _depth += 1
        stack.callback(_leave)
        yield


def _restore(owner: Any, name: str) -> tuple:
    """The call that undoes a setattr: an attribute that ``owner`` only inherits is deleted again."""
    return (setattr, owner, name, getattr(owner, name)) if name in vars(owner) else (delattr, owner, name)


def _leave() -> None:
    global _depth
    _depth -= 1


@functools.cache
def _cpu_answers() -> list[tuple[Any, str, Callable | None]]:
    """(owner, attribute, replacement): the smallest set that TP, SP, PP, VPP, DP, EP, recompute and optimizer need."""
    import megatron.core.tensor_parallel.random as tensor_parallel_random

    tensor_type = torch.Tensor.type

    def named_as_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        return tensor_type(self).replace("torch.", "torch.cuda.")

    return [
        # `device=torch.cuda.current_device()` all over: layers.py:552, mappings.py:91, param_and_grad_buffer.py:806.
        (torch.cuda, "current_device", lambda: _CPU),
        # p2p_communication.py:242 waits for the device after sends of varying length.
        (torch.cuda, "synchronize", lambda *args, **kwargs: None),
        # Literal device="cuda": schedules.py:596, 983, 2138; clip_grads.py:103; optimizer.py:473.
        (torch, "zeros", _on_cpu(torch.zeros)),
        (torch, "ones", _on_cpu(torch.ones)),
        (torch, "tensor", _on_cpu(torch.tensor)),
        # `.cuda()` on tied embeddings over pipeline stages: language_module.py:244.
        (torch.Tensor, "cuda", lambda self, *args, **kwargs: self),
        # The optimizer recognises fp32 tensors by the name 'torch.cuda.FloatTensor': clip_grads.py:167,
        # optimizer.py:671, distrib_optimizer.py:361.
        (torch.Tensor, "type", named_as_cuda),
        # The dropout and recompute tracker (random.py:235, 447) keeps CUDA generator states: here the CPU's own.
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", lambda device="cuda": torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda state, device="cuda": torch.set_rng_state(state)),
        (
            tensor_parallel_random,
            "_get_cuda_rng_state",
            lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
        ),
        (
            tensor_parallel_random,
            "_set_cuda_rng_state",
            lambda state, device=-1, graph_safe=False: torch.set_rng_state(state),
        ),
        # random.py:297 warns when the CPU's generator moves inside a fork: here that generator *is* the tracked one.
        (tensor_parallel_random.CudaRNGStatesTracker, "fork", _fork_cpu_generator),
    ]


def _on_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


@contextlib.contextmanager
def _fork_cpu_generator(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Draw from the named stream of the tracker, then go on with the stream that was current before."""
    before, before_name = torch.get_rng_state(), self._current_state_name
    torch.set_rng_state(self.states_[name])
    self._current_state_name = name
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(before)
        self._current_state_name = before_name


def name_missing_expert_kernel() -> None:
    """Call before experts are built: their router looks for a kernel of Transformer Engine under a name that only that
    one's import defines (moe_utils.py:1192)."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def spare_vllm_small_compiles() -> None:
    """Call before vLLM's engine is imported. On a CPU it would compile functions of one line at their first use.

    Above all the count that gives a sampled token's rank (v1/sample/ops/logprobs.py:10): four seconds of every start
    for a loop over one row, and the masked embedding lookup of a sharded vocabulary (vocab_parallel_embedding.py:176).
    """
    from vllm.platforms import current_platform

    if not has_gpu():
        type(current_platform).simple_compile_backend = "eager"


def forget_expert_kernels(model: torch.nn.Module) -> None:
    """Call before vLLM reloads weights. On a CPU it would go on computing with the experts' old ones.

    Their kernel repacks the weights when it is made, which a reload only does where there is none
    (fused_moe/unquantized_fused_moe_method.py:187).
    """
    if has_gpu():
        return
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


@contextlib.contextmanager
def private_shared_memory(job: str) -> Iterator[None]:
    """Build a vLLM engine in here: its ranks' shared memory is named after ``job``, until all of them have mapped it.

    On a CPU vLLM names the segment after the rendezvous, which under torchrun is always "//"
    (v1/worker/cpu_worker.py:148, distributed/device_communicators/cpu_communicator.py:237): two jobs on one machine
    collide, and so does a run with what a killed one left. Its object queues (shm_broadcast.py:337) have names of their
    own, but a killed run leaves them too, and every run the sockets beside them, in /tmp. A mapped segment lives on
    without its name until its last process ends, and so does a socket that is connected.
    ``job`` must be the same on all ranks and new for each run.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as Channel
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue as Queue

    name_of, connect, create = Channel.make_group_name, Channel._init_cpu_shm, Queue.create_from_process_group
    sockets: list[str] = []

    def connect_and_unlink(self: Any) -> int:
        handle = connect(self)  # ends with a barrier: every rank has mapped every segment
        for segment in Path("/dev/shm").glob(glob.escape(self.group_name) + "*"):
            segment.unlink(missing_ok=True)
        return handle

    def create_and_unlink(*args: Any, **kwargs: Any) -> Any:
        queue = create(*args, **kwargs)  # returns when every reader has attached
        if queue.buffer is not None and queue.buffer.is_creator:
            queue.buffer.shared_memory.unlink()
            queue.buffer.is_creator = False  # or it unlinks a second time when it is collected
            sockets.extend((queue.handle.local_subscribe_addr, queue.handle.local_notify_addr))
        return queue

    Channel.make_group_name = staticmethod(lambda communicator: job + name_of(communicator).replace("/", ""))
    Channel._init_cpu_shm = connect_and_unlink
    Queue.create_from_process_group = staticmethod(create_and_unlink)
    try:
        yield
    finally:
        Channel.make_group_name, Channel._init_cpu_shm = staticmethod(name_of), connect
        Queue.create_from_process_group = staticmethod(create)
        for address in sockets:  # only now: that readers are connected to the second is nowhere waited for
            Path(address.removeprefix("ipc://")).unlink(missing_ok=True)
