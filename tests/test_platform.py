"""Megatron's questions to CUDA are answered inside ``megatron_calls`` and nowhere else; torch comes back as it was."""

from __future__ import annotations

import importlib.util
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rlvr import platform
from megatron_rlvr.config import ConfigError
from megatron_rlvr.models import build, random_streams
from megatron_rlvr.planner.shapes import SHAPES
from megatron_rlvr.rollout.vllm_settings import key_value_bytes, memory_settings
from tests.ranks import run_ranks
from tests.tiny import make_folder

pytestmark = pytest.mark.skipif(platform.has_gpu(), reason="on a GPU there is nothing to adjust")


def _state() -> list[tuple[bool, Any]]:
    """(own attribute, value or None) of everything that is ever replaced; a name may not be there at all."""
    return [(name in vars(owner), getattr(owner, name, None)) for owner, name, _ in platform._cpu_answers()]


def _answers_are_in_force() -> bool:
    tensor = torch.ones(2, device="cuda")
    assert tensor.device.type == torch.zeros([], device=torch.device("cuda", 3)).device.type == "cpu"
    assert torch.tensor([1.0], device="cuda").cuda().device.type == "cpu"
    assert torch.cuda.current_device() == torch.device("cpu")
    torch.cuda.synchronize()
    assert tensor.type() == "torch.cuda.FloatTensor" and tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert tensor.type(torch.float64).dtype == torch.float64
    return all(getattr(owner, name) is replacement for owner, name, replacement in platform._cpu_answers())


def _torch_is_itself() -> bool:
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    assert torch.ones(1).type() == "torch.FloatTensor"
    return platform._depth == 0


class Stream:
    """In the place of a CUDA stream: what it waited for."""

    def __init__(self) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


def test_the_engine_has_its_stream_and_training_the_one_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    training, chosen, later = Stream(), Stream(), Stream()
    now = [training]
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: now.__setitem__(0, stream))
    engine = platform.EngineStream()
    with engine.entered():  # where vLLM stays on the stream that it finds
        assert now == [training]
    assert training.waited_for == [] and now == [training]
    with engine.entered():
        now[0] = chosen
    assert now == [training] and training.waited_for == [chosen]
    with pytest.raises(RuntimeError), engine.entered():  # a turn that fails comes back too
        assert now == [chosen] and chosen.waited_for == [training]
        now[0] = later
        raise RuntimeError
    assert now == [training] and training.waited_for == [chosen, later]
    with engine.entered():
        assert now == [later] and later.waited_for == [training]


def test_the_engines_share_of_a_gpu_must_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert platform.free_share() == 1.0  # nothing is begun
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 << 30, 80 << 30))
    keys = ("--kv-cache-mib", "--gpu-memory")
    assert memory_settings(64, 0.375, 1 << 40, keys) == {"gpu_memory_utilization": 0.375}
    with pytest.raises(ConfigError, match=r"^--gpu-memory=0.9 is .* only 0.375 is free .*: set less"):
        memory_settings(64, 0.9, 1, keys)


def test_a_cpus_cache_holds_one_sequence_at_least() -> None:
    longest = key_value_bytes(SHAPES["Qwen3-1.7B-Base"], 2, 4032, "bfloat16")  # 28 layers, 8 heads of 128
    assert longest == 2 * 28 * 4 * 128 * 2 * 4096 == 224 << 20
    keys = ("rollout.kv_cache_mib", "rollout.gpu_memory_utilization")
    assert memory_settings(224, 0.5, longest, keys) == {"kv_cache_memory_bytes": 224 << 20}
    with pytest.raises(ConfigError, match=r"rollout.kv_cache_mib=223 MiB cannot hold .*: set at least 224, or"):
        memory_settings(223, 0.5, longest, keys)


def test_what_cuda_reads_is_set_but_not_over_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    platform.set_cuda_environment()
    assert (os.environ["CUDA_DEVICE_MAX_CONNECTIONS"], os.environ["NVIDIA_TF32_OVERRIDE"]) == ("1", "1")


def test_experts_are_built_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.moe import moe_utils

    monkeypatch.delattr(moe_utils, "te_general_gemm", raising=False)
    platform.name_missing_expert_kernel()
    logits = moe_utils.router_gating_linear(torch.ones(2, 4), torch.ones(3, 4), None, torch.float32)
    assert logits.tolist() == [[4.0] * 3] * 2


def test_random_streams_of_a_gpu_are_left_on_a_cpu() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    before = tracker.get_states()
    state = random_streams.streams()
    states = {"model-parallel-rng": torch.arange(16, dtype=torch.uint8)}
    try:
        random_streams.restore(state | {"megatron": states})
        assert tracker.get_states() == states
        tracker.set_states({})
        random_streams.restore(state | {"megatron": states, "cuda": torch.zeros(16, dtype=torch.uint8)})
        assert tracker.get_states() == {}
    finally:
        tracker.set_states(before)


def test_torch_is_restored_exactly() -> None:
    zeros, before = torch.zeros, _state()
    with platform.megatron_calls():
        assert _answers_are_in_force()
        assert torch.zeros is not zeros
    assert torch.zeros is zeros and _torch_is_itself()
    assert all(now == then and now[1] is then[1] for now, then in zip(_state(), before, strict=True))


def test_it_is_re_entrant() -> None:
    before = _state()
    with platform.megatron_calls():
        with platform.megatron_calls():
            assert _answers_are_in_force()
        assert _answers_are_in_force()  # the inner one's end ends nothing
    assert _torch_is_itself() and _state() == before


def test_an_exception_restores_torch_too() -> None:
    before = _state()
    with pytest.raises(ZeroDivisionError), platform.megatron_calls(), platform.megatron_calls():
        assert _answers_are_in_force()
        raise ZeroDivisionError
    assert _torch_is_itself() and _state() == before
    with platform.megatron_calls():
        assert _answers_are_in_force()  # and it still works
    assert _state() == before


def test_with_a_gpu_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _state()
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    with platform.megatron_calls():
        assert _state() == before
    assert platform.backend() == "cuda:nccl,cpu:gloo"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert platform.device() == torch.device("cuda", 3)


def test_a_rank_without_a_gpu_of_its_own_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken := [].append)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=2, but this process sees 2 GPU\(s\): start no more ranks"):
        platform.start_rank()
    monkeypatch.setenv("LOCAL_RANK", "1")
    platform.start_rank()
    assert taken.__self__ == [1]


def test_a_rank_may_open_as_many_files_as_the_machine_allows_and_makes_no_plans_of_attention() -> None:
    def work() -> tuple[tuple[int, int], bool]:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
        torch.backends.cuda.enable_cudnn_sdp(True)
        platform.start_rank()
        return resource.getrlimit(resource.RLIMIT_NOFILE), torch.backends.cuda.cudnn_sdp_enabled()

    ((soft, hard), makes_plans) = run_ranks(1, work)[0]
    assert soft == hard > 256 and not makes_plans


@pytest.mark.parametrize(
    ("engine", "capability", "flash", "dtype", "packed"),
    [
        (True, (9, 0), False, torch.bfloat16, True),
        (True, (8, 0), False, torch.bfloat16, False),
        (True, (8, 0), True, torch.bfloat16, True),
        (True, (10, 0), True, torch.float32, False),
        (False, (9, 0), True, torch.bfloat16, False),
    ],
)
def test_where_transformer_engine_takes_packed_responses(
    engine: bool, capability: tuple, flash: bool, dtype: torch.dtype, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"transformer_engine": engine, "flash_attn": flash}
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there[name] or None)
    assert platform.has_packed_attention(dtype) is packed
    assert build.own_attention(1, dtype) is not packed and build.own_attention(2, dtype)


def test_a_machine_without_gpu() -> None:
    assert (platform.device(), platform.backend()) == (torch.device("cpu"), "gloo")
    assert not platform.has_transformer_engine() and not platform.has_apex_weight_gradient_kernel()


def _rotary_tables(folder: Path) -> dict[str, Any]:
    constructors = torch.utils._device._device_constructors
    constructors.cache_clear()  # as in a fresh process, whatever other tests have done
    platform.start_rank()
    found = {}
    with platform.megatron_calls():
        found["inside"] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.rotary_emb.inv_freq
        wrapped = torch.tensor
    found["after"] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.rotary_emb.inv_freq
    tables = {name: table.tolist() for name, table in found.items()}
    return tables | {"covers": torch.tensor in constructors() and wrapped not in constructors()}


def test_transformers_builds_its_rotary_table_inside_and_after(tmp_path: Path) -> None:
    """Were torch's list of device constructors first read inside, the table would silently be uninitialised memory."""
    folder = make_folder(tmp_path / "model")
    (found,) = run_ranks(1, _rotary_tables, folder, timeout=60)
    wanted = [5000.0 ** (-2 * index / 16) for index in range(8)]
    assert found["inside"] == pytest.approx(wanted) and found["after"] == pytest.approx(wanted)
    assert found["covers"]


def _draws() -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    with platform.megatron_calls():
        initialize_rng_tracker()
        tracker = get_cuda_rng_tracker()
        tracker.add("one", 11)
        torch.manual_seed(5)
        outside = [torch.rand(1).item()]
        with tracker.fork("one"):
            inside = [torch.rand(1).item()]
        with pytest.raises(ZeroDivisionError), tracker.fork("one"):
            inside.append(torch.rand(1).item())
            raise ZeroDivisionError
        outside.append(torch.rand(1).item())
        with tracker.fork("one"):
            inside.append(torch.rand(1).item())
    return {"inside": inside, "outside": outside}


def test_the_tracker_keeps_its_streams_apart() -> None:
    (found,) = run_ranks(1, _draws, timeout=30)
    for name, seed, count in (("inside", 11, 3), ("outside", 5, 2)):
        generator = torch.Generator().manual_seed(seed)
        assert found[name] == [torch.rand(1, generator=generator).item() for _ in range(count)], name
