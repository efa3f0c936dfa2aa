"""The slicer and the rotating window; what a sync does to a real engine is in tests/rollout/test_vllm_engine.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.weights import mapping
from megatron_rlvr.weights.weight_sync import WeightSync, WeightSyncError, _equal, _window, destinations
from tests.weights.test_mapping import SHAPES


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_every_element_has_a_place_on_some_rank(family, tied):
    shape = replace(SHAPES[family], tied=tied)
    sizes = mapping.hf_shapes(shape)
    for tp in (1, 2, 4, 8):  # 4 key-value heads: with 8 ranks, two hold each
        covered = {name: torch.zeros(size, dtype=torch.int) for name, size in sizes.items()}
        for rank in range(tp):
            plan = destinations(shape, rank, tp, vocab_rows=320 // tp)
            assert set(plan) == set(sizes)
            for name, places in plan.items():
                for place in places:
                    part = covered[name][place.rows]
                    (part if part.dim() == 1 else part[:, place.columns]).add_(1)
        for name, count in covered.items():
            kv = "k_proj" in name or "v_proj" in name
            copies = tp if count.dim() == 1 and "proj" not in name else max(1, tp // shape.num_kv_heads) if kv else 1
            copies *= 2 if tied and "embed" in name else 1
            assert (count == copies).all(), (name, tp)


def test_stacked_parts_follow_each_other():
    plan = destinations(SHAPES["qwen3"], tp_rank=1, tp_size=2, vocab_rows=192)
    prefix = "model.layers.0.self_attn."
    query, key, value = (plan[f"{prefix}{name}_proj.weight"][0] for name in "qkv")
    assert {query.parameter, key.parameter, value.parameter} == {f"{prefix}qkv_proj.weight"}
    assert [part.held_rows for part in (query, key, value)] == [slice(0, 24), slice(24, 36), slice(36, 48)]
    assert [part.rows for part in (query, key, value)] == [slice(24, 48), slice(12, 24), slice(12, 24)]


def test_a_rank_behind_the_vocabulary_holds_no_row():
    small = replace(SHAPES["qwen3"], vocab_size=19)
    place = destinations(small, tp_rank=1, tp_size=2, vocab_rows=32)["lm_head.weight"][0]
    assert torch.ones(19, 4)[place.rows].shape == (0, 4)
    assert torch.ones(32, 4)[place.held_rows].shape == (0, 4)


class Holder:
    """In the place of an engine of one rank: takes everything, or fails at a weight."""

    tp_rank, tp_size, ready = 0, 1, True

    def __init__(self, refused: str = "") -> None:
        self.refused = refused

    def held(self, parameter: str, columns: slice) -> torch.Tensor:
        return torch.zeros(320, 1)

    def parameter_names(self) -> set[str]:
        return set()

    def is_plain(self, parameter: str) -> bool:
        return False

    def load_weights(self, weights) -> None:
        for name, _ in weights:
            if name == self.refused:
                raise RuntimeError("the engine is out of memory")


def test_a_rank_whose_own_gathering_fails_does_not_go_on_alone() -> None:
    """The others wait in a collective of it: a question of this rank's to all of them would wait for ever."""
    shape, sent = SHAPES["qwen2"], []

    def weights(fails: bool):
        for name, size in mapping.hf_shapes(shape).items():
            sent.append(name)
            yield name, torch.zeros(size)
            if fails and len(sent) == 3:
                raise RuntimeError("this rank is out of memory")

    engine = Holder()
    sync = WeightSync(engine, shape, ParallelGroups.single())
    with pytest.raises(RuntimeError, match="^this rank is out of memory$"):
        sync.push(weights(fails=True))
    assert not engine.ready and len(sent) == 3
    sent.clear()
    engine.refused = next(iter(mapping.hf_shapes(shape)))
    with pytest.raises(WeightSyncError, match="failed on rank 0: RuntimeError: the engine is out of memory"):
        sync.push(weights(fails=False))
    assert not engine.ready and len(sent) == len(mapping.hf_shapes(shape))  # every rank was followed to the end


@pytest.mark.parametrize(("columns", "width"), [(48, 48), (128, 128), (129, 16), (896, 16), (1024, 16), (5125, 1)])
def test_a_round_of_windows_covers_every_column(columns, width):
    seen = torch.zeros(columns, dtype=torch.int)
    for sync in range(3, 3 + -(-columns // width)):
        window = _window(columns, sync)
        assert window.stop - window.start == width
        seen[window] += 1
    assert (seen >= 1).all()


def test_equality_is_exact_but_for_what_a_kernel_cannot_hold():
    wanted = torch.tensor([1.0, 0.0, -0.0, 1e-39], dtype=torch.bfloat16)
    assert _equal(torch.tensor([1.0, -0.0, 0.0, 0.0], dtype=torch.bfloat16), wanted)
    assert not _equal(torch.tensor([1.0078125, 0.0, 0.0, 0.0], dtype=torch.bfloat16), wanted)
    assert not _equal(wanted[:3], wanted)
    nan = wanted * torch.nan
    assert not _equal(nan, nan)
