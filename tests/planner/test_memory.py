"""What the planner repeats of the parts that it predicts is what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_rlvr import platform
from megatron_rlvr.distributed import vocab_linear
from megatron_rlvr.models.attention import PackedSequences
from megatron_rlvr.planner import memory
from megatron_rlvr.planner.activations import MOST_PADDING, in_flight, layer_bytes
from megatron_rlvr.planner.devices import DEVICES
from megatron_rlvr.planner.memory import Item, Memory
from megatron_rlvr.planner.shapes import SHAPES
from megatron_rlvr.planner.text import as_text
from megatron_rlvr.planner.workload import Workload
from megatron_rlvr.rollout import vllm_settings
from tests.planner.test_plan import QWEN32, plan


@pytest.mark.parametrize("gpu", [False, True])
def test_the_planner_knows_the_sizes_of_what_it_does_not_import(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It repeats them, for to import them it would have to import torch."""
    monkeypatch.setattr(platform, "has_gpu", lambda: gpu)
    assert memory.LOGITS_BLOCK[not gpu] == platform.logits_block_elements()
    assert memory.TOKENS_AT_A_TIME == vllm_settings.TOKENS_AT_A_TIME
    assert (memory.LEAST_ROWS, memory.PRODUCT_ROWS) == (vocab_linear.LEAST_ROWS, vocab_linear.PRODUCT_ROWS)
    config = plan(QWEN32).config
    config.model.logits, model = "fused", Workload.of(config).policy
    columns, h = model.padded_vocab(config.parallel.tp) // config.parallel.tp, model.hidden_size
    tokens = memory.microbatch(config)
    height, width = vocab_linear.tile(tokens, columns)
    products = 0 if gpu else 2 * vocab_linear.PRODUCT_ROWS * h * 2
    held = height * width * 2 + height * h * 4 + products
    hidden = tokens * h * 2 * (2 if config.parallel.sequence_parallel else 1)
    device = DEVICES["h100" if gpu else "cpu"]
    assert memory.head_bytes(config, model, device) == held + hidden
    config.model.logits = "fused_float32"  # four bytes a logit, and two of a tile's gradient
    assert memory.head_bytes(config, model, device) == held + hidden + 4 * height * width


def test_a_small_share_of_the_engine_is_less_than_a_weight_sync() -> None:
    config = plan(QWEN32).config
    workload, device = Workload.of(config), DEVICES["h100"]
    assert [item.name for item in memory.engine_items(config, workload, device)] == ["engine"]
    config.rollout.gpu_memory_utilization = 0.2
    weights, sync = memory.engine_items(config, workload, device)
    model = workload.policy
    embedding = 2 * model.vocab_size * model.hidden_size
    assert weights.bytes == memory.engine_weights(config, workload)
    assert embedding < sync.bytes < 3 * embedding


def test_the_host_memory_of_a_node_has_room_for_every_sleeping_matrix_and_a_checkpoint() -> None:
    found = plan(QWEN32)
    engines, checkpoint = found.host_memory
    tp, model, layers = found.config.rollout_tp, found.workload.policy, found.workload.policy.num_layers
    h, ffn, vocabulary = model.hidden_size, model.ffn_size // tp, model.vocab_size // tp
    qkv, bias = (model.query_size + 2 * model.kv_size) // tp, (model.query_size + 2 * model.kv_size) // tp
    matrices = layers * [qkv * h, bias, model.query_size // tp * h, 2 * ffn * h, ffn * h, h, h] + 2 * [vocabulary * h]
    rounded = 8 * sum(1 << (2 * elements - 1).bit_length() for elements in matrices)
    assert 8 * sum(2 * elements for elements in matrices) < rounded < engines.bytes < 1.1 * rounded
    held = {item.name: item.bytes for item in memory.state_items(found.config, found.workload, 0)}
    assert checkpoint.bytes == 8 * (held["policy weights"] + held["policy optimizer"])
    assert "host memory of a node, at most 351 GiB" in as_text(found)
    assert found.to_dict()["host_memory"][0]["bytes"] == engines.bytes
    found.config.parallel.pp = 4  # the last stage has the final norm too
    first, *_, last = [memory.checkpoint_copy(found.config, found.workload, stage) for stage in range(4)]
    assert found.host_memory[1].bytes == 8 * last > 8 * first


def test_a_cpu_holds_a_checkpoint_on_its_way_beside_the_step() -> None:
    config = plan(QWEN32).config
    workload, cpu = Workload.of(config), DEVICES["cpu"]

    def copied(every: int) -> int:
        config.trainer.save_every = every
        return sum(item.bytes for item in memory.training_items(config, workload, cpu, 0) if item.name == "checkpoint")

    held = {item.name: item.bytes for item in memory.state_items(config, workload, 0)}
    assert (copied(0), copied(10)) == (0, held["policy weights"] + held["policy optimizer"])
    assert memory.host_memory(config, workload, cpu, 8) == ()


def test_an_engine_that_stays_is_there_while_the_policy_trains() -> None:
    parts = [(Item("", size, ""),) for size in (1, 20, 300, 4000)]
    asleep, awake = (Memory(0, *parts, engine_stays=stays) for stays in (False, True))
    assert (asleep.training_peak, asleep.generation_peak) == (321, 4021)
    assert (awake.training_peak, awake.generation_peak) == (4321, 4021)
    assert memory.fullest([asleep, awake, asleep]) is awake
    config = plan(QWEN32).config
    for name, stays in (("cpu", True), ("h100", False)):
        assert memory.predict(config, Workload.of(config), DEVICES[name])[0].engine_stays is stays


def test_what_makes_a_rank_hold_more() -> None:
    found = plan(QWEN32)
    config, workload, gpu = found.config, found.workload, found.machine.device

    def training(workload: Workload) -> dict[str, int]:
        return {item.name: item.bytes for item in memory.training_items(config, workload, gpu, 0)}

    frozen = memory.state_items(config, replace(workload, reference=True), 0)
    held = {item.name: item.bytes for item in frozen}
    assert frozen[:-1] == memory.state_items(config, workload, 0)
    assert held["reference weights"] == held["policy weights"]

    tokens = 256 * 8 * 10_240 // 8  # of the longest responses of a step, over 8 replicas
    plain, kept = (training(replace(workload, old_top=top))["batch"] for top in (0, 128))
    assert kept - plain == tokens * 128 * (8 + 4)  # an id and its log-prob

    small, large = (training(replace(workload, critic=SHAPES[name])) for name in ("Qwen2.5-1.5B", "Qwen2.5-72B"))
    assert small == training(workload)  # the policy's backward is the heaviest moment
    assert "activations" not in large and large["critic activations"] > small["activations"]

    before = memory.kv_cache(config, workload, gpu)
    config.rollout.max_running += 100  # fp32 logits of each, and their sorted copy
    assert before - memory.kv_cache(config, workload, gpu) == 100 * 152_064 * 4 * 2

    assert memory.microbatch(config) == config.trainer.microbatch_tokens
    config.rollout.prompts_per_step = 1  # eight responses, one a rank
    assert memory.microbatch(config) == 10_240


def test_microbatches_in_flight_are_those_of_megatrons_schedules() -> None:
    """Its warm-up and the one that runs: by stage; of interleaved stages chunks, 2 (p - s - 1) + (v - 1) p of them."""
    config = plan(QWEN32).config
    config.parallel.pp = 4
    assert [in_flight(config, 99, stage) for stage in range(4)] == [(4, 4), (3, 4), (2, 4), (1, 4)]
    assert in_flight(config, 2, 0) == (2, 4)
    config.parallel.vpp = 2
    assert [in_flight(config, 99, stage) for stage in range(4)] == [(11, 8), (9, 8), (7, 8), (5, 8)]
    assert in_flight(config, 4, 0) == (8, 8)


def test_ranks_of_cp_hold_their_tokens_of_a_microbatch_and_their_share_of_the_optimizer() -> None:
    config = plan(QWEN32).config
    workload = Workload.of(config)
    before = memory.microbatch(config), {item.name: item.bytes for item in memory.state_items(config, workload, 0)}
    config.parallel.cp, config.parallel.dp = 2, config.parallel.dp // 2
    after = memory.microbatch(config), {item.name: item.bytes for item in memory.state_items(config, workload, 0)}
    assert (2 * after[0], after[1]) == before


def test_padding_of_views_is_what_the_planner_counts_at_worst() -> None:
    """Of a token's bytes in a layer, those of the core attention: queries, keys, values and output, padded."""
    lengths = [1414, *[1000] * 200]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    places = sum(view.tokens.numel() for view in PackedSequences.from_cu_seqlens(cu_seqlens).views)
    assert MOST_PADDING * 0.99 < places / sum(lengths) < MOST_PADDING
    config = plan(QWEN32).config
    config.parallel.cp, model = 2, Workload.of(config).policy
    h100, a100 = DEVICES["h100"], DEVICES["a100-80"]
    whole, selective = (layer_bytes(config, model, 1000, h100, selective=choice) for choice in (False, True))
    config.parallel.cp = 1  # on Ampere and in float32 Transformer Engine's attention is not taken either
    assert layer_bytes(config, model, 1000, a100) == whole > layer_bytes(config, model, 1000, h100)
    config.model.dtype = "float32"
    assert layer_bytes(config, model, 1000, a100) == layer_bytes(config, model, 1000, h100) > whole
    core = MOST_PADDING * (4 * model.query_size * 2 + 4 * model.num_heads) - 2 * (model.query_size + 2 * model.kv_size)
    assert whole - selective == pytest.approx(1000 * core / config.parallel.tp, rel=1e-3)
