"""What the step asks of a rollout engine, and which tokens end a response."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_rlvr.config import ConfigError, rule
from megatron_rlvr.types import FinishReason


@dataclass(frozen=True)
class Request:
    """One response to sample.

    Request(prompt_token_ids=[3, 11, 5], seed=8124410934, max_tokens=7, temperature=1.0)
    """

    prompt_token_ids: list[int]
    seed: int
    max_tokens: int
    temperature: float  # 0: greedy
    top: int = 0  # most probable tokens whose log-probs come with each sampled one
    top_p: float = 1.0  # below 1 only where nothing is learned from the sample


@dataclass(frozen=True)
class Sample:
    """One response: the end token included where it was sampled, and the log-prob each token was sampled with.

    Sample(response_ids=[5, 13, 7, 1], log_probs=[-0.4, -1.2, -0.03, -0.1], finish_reason="stop")
    """

    response_ids: list[int]
    log_probs: list[float]
    finish_reason: FinishReason
    # Per token, where the request asks for a top: those log-probs in descending order, and that of the sampled token
    # among them even where it is less probable; no more than the vocabulary has.
    top_log_probs: list[list[float]] = field(default_factory=list)

    @property
    def said(self) -> list[int]:
        """Without the end token, but with any other special one: hidden from a verifier, it would earn a reward."""
        return self.response_ids[:-1] if self.finish_reason == "stop" else self.response_ids


class EngineNotReady(RuntimeError):
    """The engine's weights are not known to be the policy's: samples of them would be somebody else's words."""


class Engine(Protocol):
    """One rank's part of an engine replica; the ranks of a replica call everything together, with equal arguments."""

    ready: bool  # False from the beginning of a weight load until the weights are proven
    tp_rank: int
    tp_size: int

    def generate(self, requests: list[Request], ended: Callable[[int], Any] = ...) -> list[Sample]:
        """One sample per request, in order; ``ended`` is told how many more have ended. Raises EngineNotReady."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace every weight by a stream of (Hugging Face name, whole tensor); forget what was cached of the old."""
        ...

    def parameter_names(self) -> set[str]:
        """The engine's own parameters, with its own fused names."""
        ...

    def held(self, parameter: str, columns: slice) -> Tensor:
        """What the engine computes with: [rows, columns] of a matrix, all of a vector. Raises KeyError."""
        ...

    def is_plain(self, parameter: str) -> bool:
        """Whether the engine computes with that tensor itself, so that ``held`` is a view and all of it can be read."""
        ...

    def close(self) -> None:
        """End the engine; the last act of a run, for the process groups end with it."""
        ...


def stop_token_ids(model_path: str | Path) -> list[int]:
    """The tokens that end a response: those of generation_config.json, else of config.json, and the tokenizer's own.

    Raises ConfigError when none of the model's tokens is named: a response could then only end at its length limit.
    """
    folder = Path(model_path)
    vocab_size = _read(folder / "config.json").get("vocab_size", 0)
    named = _read(folder / "generation_config.json").get("eos_token_id")
    if named is None:
        named = _read(folder / "config.json").get("eos_token_id")
    ids = set(named if isinstance(named, list) else [] if named is None else [named])
    token = _read(folder / "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    ids |= {item["id"] for item in _read(folder / "tokenizer.json").get("added_tokens", []) if item["content"] == text}
    known = sorted(token for token in ids if token < vocab_size)
    rule(
        bool(known),
        f"{folder} names no end token below vocab_size={vocab_size}: set eos_token_id in its generation_config.json or "
        f"config.json",
    )
    return known


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
