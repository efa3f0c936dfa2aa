"""The values that flow through one step, each with a literal example.

Letters: P prompts per step, G responses per prompt, N = P * G responses of the step over all ranks,
S responses on this data-parallel rank, T packed tokens on this rank, H heads of the critic.

Every [T] tensor is aligned to the *predicted* token: entry t belongs to the token that the model predicts
after reading ``token_ids[t]``. The shift happens once, in packing.py; nothing else ever rolls a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megatron_rlvr.verdict import Verdict

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """One question, already a token sequence.

    Prompt(id="train/17", text="3,5,7=38>", token_ids=(3, 13, 5, 13, 7, 14, 3, 8, 15), verifier="countdown",
           answer={"numbers": [3, 5, 7], "target": 38})
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    verifier: str
    answer: Any


@dataclass
class Rollout:
    """One sampled response, with the log-probs that the engine sampled it with.

    Rollout(sample_index=0, response_ids=[5, 12, 7, 10, 3, 16], rollout_log_probs=[-0.4, ...], finish_reason="stop",
            policy_version=12, text="5*7+3")
    """

    sample_index: int
    response_ids: list[int]
    rollout_log_probs: list[float]
    finish_reason: FinishReason
    policy_version: int
    text: str = ""
    verdict: Verdict = None  # type: ignore[assignment]  # None until a verifier has judged it
    extras: dict[str, list[float]] = field(default_factory=dict)  # name -> a number per token, of the methods


@dataclass
class RolloutGroup:
    """A prompt and its G responses."""

    prompt: Prompt
    rollouts: list[Rollout]


class NotFilledError(AttributeError):
    """A batch field was read before the phase that fills it."""


@dataclass
class Microbatch:
    """What one pipeline microbatch holds: a run of whole responses, t tokens and s responses.

    Two responses, 9 + 6 and 9 + 3 tokens: cu_seqlens = [0, 15, 27], t = 27, s = 2.
    """

    token_ids: Tensor  # [t] int64, prompt and response
    target_ids: Tensor  # [t] int64, the token after token_ids[t]; 0 behind the last token of a response
    position_ids: Tensor  # [t] int64, restarts at 0 with each response
    loss_mask: Tensor  # [t] bool, True where the predicted token belongs to the response
    response_index: Tensor  # [t] int64, 0 .. s-1
    rollout_log_probs: Tensor  # [t] fp32, 0 outside loss_mask
    cu_seqlens: Tensor  # [s + 1] int32
    response_ids: Tensor  # [s] int64, place of the response in the step: prompt index * G + sample index
    rewards: Tensor  # [s] fp32, as scaled by reward.scale
    response_lengths: Tensor  # [s] int64, predicted response tokens
    # None until the phase in FILLED_BY has run, and reading them until then raises.
    states: Tensor = None  # type: ignore[assignment]  # [s, h] fp32, what the old policy makes of each whole response
    old_log_probs: Tensor = None  # type: ignore[assignment]  # [t] fp32
    entropy: Tensor = None  # type: ignore[assignment]  # [t] fp32, of the old policy
    old_top_ids: Tensor = None  # type: ignore[assignment]  # [t, K] int64, its most probable kept tokens
    old_top_log_probs: Tensor = None  # type: ignore[assignment]  # [t, K] fp32
    ref_log_probs: Tensor = None  # type: ignore[assignment]  # [t] fp32
    values: Tensor = None  # type: ignore[assignment]  # [t, H] fp32, of the state before the predicted token
    advantages: Tensor = None  # type: ignore[assignment]  # [t] fp32
    returns: Tensor = None  # type: ignore[assignment]  # [t] fp32
    value_weights: Tensor = None  # type: ignore[assignment]  # [t, H] fp32, a squared error's share of the critic loss
    extras: dict[str, Tensor] = field(default_factory=dict)  # name -> [t], from the exploration methods

    FILLED_BY: ClassVar[dict[str, str]] = {
        "states": "policy.fill_states",
        "old_log_probs": "policy.fill_log_probs, if a method asks with Needs(old_statistics=True), else the loss",
        "entropy": "policy.fill_log_probs, if a method asks with Needs(old_statistics=True), else the loss",
        "old_top_ids": "policy.fill_log_probs, with options that ask for a top,",
        "old_top_log_probs": "policy.fill_log_probs, with options that ask for a top,",
        "ref_log_probs": "reference.fill_log_probs",
        "values": "critic.fill_values",
        "advantages": "the advantage phase of the step",
        "returns": "the advantage phase of the step",
        "value_weights": "the advantage phase of the step",
    }

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if value is None and name in type(self).FILLED_BY:
            raise NotFilledError(f"{name} is not filled yet: {type(self).FILLED_BY[name]} fills it")
        return value

    def has(self, name: str) -> bool:
        """Whether the phase that fills ``name`` has run."""
        return object.__getattribute__(self, name) is not None

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()

    @property
    def num_responses(self) -> int:
        return self.response_lengths.numel()

    @property
    def known_log_probs(self) -> Tensor:
        """[t] what is known of the old policy before the loss: its own pass where one is made, else the rollout's."""
        return self.old_log_probs if self.has("old_log_probs") else self.rollout_log_probs

    def per_token(self, values: Tensor) -> Tensor:
        """[s] -> [t]: each response's value at each of its tokens."""
        return values[self.response_index]

    def per_response_sum(self, values: Tensor) -> Tensor:
        """[t] -> [s]: the sum over the loss tokens of each response.

        In fp64: a GPU adds in an order of its own each time, and tensor-parallel ranks must come to the same fp32.
        """
        masked = torch.where(self.loss_mask, values, torch.zeros_like(values)).double()
        empty = torch.zeros(self.num_responses, dtype=torch.float64, device=values.device)
        return empty.index_add(0, self.response_index, masked).to(values.dtype)


_PER_RESPONSE = {"response_ids", "rewards", "response_lengths", "states"}


@dataclass(frozen=True)
class Update:
    """One optimizer step's share of the batch.

    Update(microbatches=((0, 24), (24, 48)), num_tokens=412, num_responses=64): this rank's responses 0-23 and 24-47,
    while 412 loss tokens and 64 responses are the counts over *every* rank and microbatch of the update.
    """

    microbatches: tuple[tuple[int, int], ...]
    num_tokens: int
    num_responses: int


@dataclass
class Batch(Microbatch):
    """This data-parallel rank's share of a step: S responses, T tokens, in the order of its updates' microbatches."""

    updates: tuple[Update, ...] = ()
    num_step_responses: int = 0  # N, over every rank
    group_size: int = 1  # G

    def microbatch(self, start: int, stop: int) -> Microbatch:
        """Responses start .. stop-1, as views where that is possible."""
        low, high = int(self.cu_seqlens[start]), int(self.cu_seqlens[stop])
        sliced: dict[str, Any] = {}
        for item in fields(Microbatch):
            value = object.__getattribute__(self, item.name)
            if item.name == "extras":
                sliced["extras"] = {name: tensor[low:high] for name, tensor in value.items()}
            elif item.name == "cu_seqlens":
                sliced["cu_seqlens"] = value[start : stop + 1] - low
            elif item.name == "response_index":
                sliced["response_index"] = value[low:high] - start
            elif value is None:
                sliced[item.name] = None
            else:
                sliced[item.name] = value[start:stop] if item.name in _PER_RESPONSE else value[low:high]
        return Microbatch(**sliced)

    def of_update(self, update: Update) -> Microbatch:
        """Everything that this rank holds of an update, as one microbatch."""
        return self.microbatch(update.microbatches[0][0], update.microbatches[-1][1])

    def keep(self, update: Update, name: str, values: Tensor) -> None:
        """Store [t] values of an update's tokens as extras, where its microbatches will find them."""
        first, last = update.microbatches[0][0], update.microbatches[-1][1]
        rows = slice(int(self.cu_seqlens[first]), int(self.cu_seqlens[last]))
        self.extras.setdefault(name, values.new_zeros(self.num_tokens))[rows] = values

    def microbatches(self) -> list[Microbatch]:
        """Every microbatch of every update, in order: what a forward-only pass runs over."""
        return [self.microbatch(*bounds) for update in self.updates for bounds in update.microbatches]

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on ``device``."""
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = object.__getattribute__(self, item.name)
            if isinstance(value, Tensor):
                value = value.to(device)
            elif item.name == "extras":
                value = {name: tensor.to(device) for name, tensor in value.items()}
            moved[item.name] = value
        return Batch(**moved)
