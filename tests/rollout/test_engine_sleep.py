"""Which part of a GPU engine's memory is there when: recorded, for no CPU engine sleeps.

What these tests do not show: that vLLM gives the memory back.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rlvr import platform
from megatron_rlvr.rollout.engine import Request
from megatron_rlvr.rollout.vllm_engine import CACHE, WEIGHTS, VllmEngine


class Recorded:
    """In the place of vllm.LLM: what is awake, and what was awake at each call that needs memory."""

    def __init__(self) -> None:
        self.awake = {WEIGHTS, CACHE}
        self.at: list[tuple[str, frozenset[str]]] = []

    def sleep(self, level: int) -> None:
        assert level == 1 and WEIGHTS in self.awake  # asleep already, vLLM would only warn
        self.awake = set()

    def wake_up(self, tags: list[str]) -> None:
        assert tags and not set(tags) & self.awake
        self.awake |= set(tags)

    def collective_rpc(self, name: str, kwargs: dict[str, Any]) -> None:
        self.at.append((name, frozenset(self.awake)))

    def reset_prefix_cache(self) -> bool:
        return True

    def generate(self, prompts: list, settings: list, use_tqdm: type) -> list:
        self.at.append(("generate", frozenset(self.awake)))
        step = SimpleNamespace(logprob=-0.5)
        answer = SimpleNamespace(token_ids=[1], logprobs=[{1: step}], finish_reason="stop")
        return [SimpleNamespace(outputs=[answer]) for _ in prompts]


@pytest.fixture
def engine() -> VllmEngine:
    made = VllmEngine.__new__(VllmEngine)
    made._llm, made._model, made._stop_ids, made._vocab_size = Recorded(), torch.nn.Module(), [1], 8
    made._can_sleep, made._asleep, made.ready = True, set(), False
    made._stream = platform.EngineStream()
    return made


def push(engine: VllmEngine) -> None:
    engine.load_weights([])
    engine.ready = True


def test_weights_arrive_while_the_cache_is_away_and_training_has_all_the_memory(engine: VllmEngine) -> None:
    request = Request([3], seed=1, max_tokens=1, temperature=1.0)
    push(engine)  # the first one: the engine has just been made and is awake
    assert engine._llm.awake == {WEIGHTS}
    for _ in range(2):
        assert len(engine.generate([request])) == 1
        assert engine._llm.awake == set()  # training
        push(engine)
    reload, generate = ("reload_weights", frozenset({WEIGHTS})), ("generate", frozenset({WEIGHTS, CACHE}))
    assert engine._llm.at == [reload, generate, reload, generate, reload]


def test_two_generations_in_a_row_wake_it_twice(engine: VllmEngine) -> None:
    push(engine)
    for _ in range(2):
        engine.generate([Request([3], seed=1, max_tokens=1, temperature=1.0)])
    assert [awake for name, awake in engine._llm.at if name == "generate"] == [{WEIGHTS, CACHE}] * 2


def test_a_replica_without_prompts_sleeps_too(engine: VllmEngine) -> None:
    push(engine)
    assert engine.generate([]) == []
    assert engine._llm.awake == set() and [name for name, _ in engine._llm.at] == ["reload_weights"]


def test_an_engine_that_cannot_sleep_is_left_awake(engine: VllmEngine) -> None:
    engine._can_sleep = False
    push(engine)
    engine.generate([Request([3], seed=1, max_tokens=1, temperature=1.0)])
    assert engine._llm.awake == {WEIGHTS, CACHE}
