"""What runs on a rank: policies in a layout, batches filled from the reference's samples, gradients to compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_rlvr import platform
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.vocab import StatisticsOptions, TokenStatistics
from megatron_rlvr.losses import Clip, clipped_surrogate, reduction_weights
from megatron_rlvr.metrics import Meter
from megatron_rlvr.models.build import initialize_parallel
from megatron_rlvr.models.policy import Policy
from megatron_rlvr.packing import pack
from megatron_rlvr.types import Batch, Microbatch, RolloutGroup, Update
from megatron_rlvr.weights import mapping
from megatron_rlvr.weights.gather import global_parameters
from tests.models import reference
from tests.models.reference import Sample
from tests.tiny import make_config

OPTIONS = StatisticsOptions(reference.TEMPERATURE, reference.MIN_P, None, reference.THRESHOLD_TEMPERATURE)
EVERYTHING = 4000  # tokens: the whole batch in one microbatch
STILL = {"lr": 1e-30, "clip_grad": 1e6, "distributed": False}  # an update that leaves weights and gradients alone


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    cp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def __str__(self) -> str:
        name = f"tp{self.tp}-pp{self.pp}-vpp{self.vpp}-dp{self.dp}"
        return name + f"-cp{self.cp}" * (self.cp > 1) + "-sp" * self.sequence_parallel


LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2),
    Layout(pp=2, vpp=2),
    Layout(dp=2),
    Layout(tp=2, pp=2, sequence_parallel=True),
    Layout(tp=2, dp=2),
    Layout(cp=2),
    Layout(tp=2, cp=2, sequence_parallel=True),
    Layout(pp=2, cp=2),
]


@contextmanager
def megatron(layout: Layout) -> Iterator[ParallelGroups]:
    """Megatron's groups for one layout over the ranks that are there, taken down again afterwards."""
    try:
        yield initialize_parallel(make_config(Path("unused"), {"parallel": vars(layout)}))
    finally:
        parallel_state.destroy_model_parallel()


def make_policy(folder: Path, layout: Layout, groups: ParallelGroups, **sections: Any) -> Policy:
    config = make_config(folder, {"parallel": vars(layout)} | sections)
    return Policy(config, Architecture.from_folder(folder), groups)


def make_batch(
    groups: list[RolloutGroup],
    samples: dict[int, Sample],
    layout: Layout,
    ranks: ParallelGroups,
    microbatch_tokens: int,
    updates: int = 1,
) -> Batch:
    """This rank's batch, on its device; a response without a sample counts as not scored."""
    size = len(groups[0].rollouts)
    rewards = [
        [1.0 if row * size + column in samples else None for column in range(size)] for row in range(len(groups))
    ]
    batch = pack(
        groups,
        rewards,
        updates=updates,
        microbatch_tokens=microbatch_tokens,
        dp_rank=ranks.dp_rank,
        dp_size=ranks.dp_size,
        microbatch_multiple=layout.pp if layout.vpp > 1 else 1,
    )
    batch.old_log_probs = torch.zeros(batch.num_tokens)
    batch.advantages = torch.zeros(batch.num_tokens)
    for place, identity in enumerate(batch.response_ids.tolist()):
        if identity in samples:
            mask = batch.loss_mask & (batch.response_index == place)
            batch.old_log_probs[mask] = samples[identity].old_log_probs
            batch.advantages[mask] = samples[identity].advantages
    return batch.to(platform.device())


def loss(update: Update, micro: Microbatch, current: TokenStatistics, meter: Meter) -> Tensor:
    """The reference's loss in the project's own parts."""
    losses, _ = clipped_surrogate(current.log_prob, micro, Clip(reference.CLIP_LOW, reference.CLIP_HIGH))
    losses = losses - reference.ENTROPY_WEIGHT * current.entropy - reference.KEPT_WEIGHT * current.log_kept_mass
    weights = reduction_weights(micro, update, "token_mean")
    return torch.where(micro.loss_mask, weights * losses, 0.0).sum()


def run_update(policy: Policy, batch: Batch, number: int = 0) -> dict[str, float]:
    """Update ``number`` of the batch -> its metrics."""
    update = batch.updates[number]
    return policy.update(batch, update, partial(loss, update), OPTIONS).means()


def weights(policy: Policy) -> dict[str, Tensor]:
    """This rank's parameters by their global Megatron names."""
    return {name: parameter.detach().clone() for name, parameter in global_parameters(policy.chunks).items()}


def gradients(policy: Policy) -> dict[str, Tensor]:
    """This rank's gradients of the last update, over every data-parallel rank; not with a distributed optimizer."""
    return {name: parameter.main_grad.clone() for name, parameter in global_parameters(policy.chunks).items()}


def distance(policy: Policy, found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest |difference| of this rank's tensors, copies and padding included, over the largest |entry| of the whole.

    ``expected`` holds whole tensors under Hugging Face names, cut here as this rank should hold them.
    """
    worst = (0.0, "")
    for name, tensor in found.items():
        entry = mapping.find(policy.architecture, name)
        wholes = [expected[source].double() for source in entry.hf]
        shard = mapping.to_megatron(entry, wholes, policy.architecture, policy.groups.tp_rank, policy.groups.tp_size)
        scale = max(float(whole.abs().max()) for whole in wholes)
        worst = max(worst, (float((tensor.cpu().double() - shard).abs().max()) / scale, name))
    return worst
