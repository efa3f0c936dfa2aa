"""The process groups of a run, by the name of what they split, and the one line that starts and ends them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rlvr import platform
from megatron_rlvr.config import ConfigError

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def init(timeout_seconds: float) -> None:
    """Join the default process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    A collective that waits longer than ``timeout_seconds`` for a peer fails instead of hanging. Raises ConfigError when
    a variable is missing or the address cannot be used, for example because another job holds the port.
    """
    missing = [name for name in _RENDEZVOUS if name not in os.environ]
    if missing:
        raise ConfigError(f"{', '.join(missing)} not set: start the ranks with torchrun, which sets them for each")
    try:
        dist.init_process_group(platform.backend(), init_method="env://", timeout=timedelta(seconds=timeout_seconds))
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"the ranks cannot meet at {address} ({error}): give the run a free port with torchrun --master-port"
        ) from error


def place() -> tuple[int, int]:
    """(rank, number of ranks) in the default process group."""
    return dist.get_rank(), dist.get_world_size()


def destroy() -> None:
    """Leave every process group; does nothing when none was joined, so that it can end any run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def group_size(group: ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def group_rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's group along each way of splitting the work; None stands for a group of one rank.

    tp=2, pp=2, dp=1 on global rank 3: tp holds ranks (2, 3), pp holds (1, 3), dp is None, world holds (0, 1, 2, 3).
    """

    tp: ProcessGroup | None = None  # shards of one layer
    pp: ProcessGroup | None = None  # stages of one model, first to last
    dp: ProcessGroup | None = None  # replicas, each with its own responses
    cp: ProcessGroup | None = None  # stretches of one microbatch, whose responses all of these ranks know
    world: ProcessGroup | None = None

    @staticmethod
    def single() -> ParallelGroups:
        """One process, no communication."""
        return ParallelGroups()

    @staticmethod
    def from_grid(tp: int = 1, pp: int = 1, dp: int = 1, cp: int = 1) -> ParallelGroups:
        """Groups over the default process group, ranks laid out as Megatron does: tp fastest, then cp, dp, pp.

        Every rank calls it, with the same sizes. Raises ConfigError when they do not multiply to the number of ranks.
        """
        world = dist.get_world_size()
        if tp * cp * pp * dp != world:
            raise ConfigError(
                f"tp={tp} x cp={cp} x pp={pp} x dp={dp} is {tp * cp * pp * dp} ranks, but {world} were started"
            )
        ranks = torch.arange(world).view(pp, dp, cp, tp)
        return ParallelGroups(
            tp=_join(ranks.reshape(-1, tp)),
            cp=_join(ranks.transpose(2, 3).reshape(-1, cp)),
            dp=_join(ranks.movedim(1, 3).reshape(-1, dp)),
            pp=_join(ranks.movedim(0, 3).reshape(-1, pp)),
            world=dist.group.WORLD if world > 1 else None,
        )

    @staticmethod
    def from_megatron() -> ParallelGroups:
        """The groups of ``megatron.core.parallel_state``, which must be initialised."""
        from megatron.core import parallel_state

        return ParallelGroups(
            tp=_unless_alone(parallel_state.get_tensor_model_parallel_group()),
            pp=_unless_alone(parallel_state.get_pipeline_model_parallel_group()),
            dp=_unless_alone(parallel_state.get_data_parallel_group()),
            cp=_unless_alone(parallel_state.get_context_parallel_group()),
            world=_unless_alone(dist.group.WORLD),
        )

    @property
    def tp_rank(self) -> int:
        return group_rank(self.tp)

    @property
    def tp_size(self) -> int:
        return group_size(self.tp)

    @property
    def pp_rank(self) -> int:
        return group_rank(self.pp)

    @property
    def pp_size(self) -> int:
        return group_size(self.pp)

    @property
    def dp_rank(self) -> int:
        return group_rank(self.dp)

    @property
    def dp_size(self) -> int:
        return group_size(self.dp)

    @property
    def cp_rank(self) -> int:
        return group_rank(self.cp)

    @property
    def cp_size(self) -> int:
        return group_size(self.cp)

    @property
    def rank(self) -> int:
        return group_rank(self.world)

    @property
    def world_size(self) -> int:
        return group_size(self.world)

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def _unless_alone(group: ProcessGroup | None) -> ProcessGroup | None:
    return None if group_size(group) == 1 else group


def _join(rows: Tensor) -> ProcessGroup | None:
    """This rank's group among ``rows`` [groups, size]. Creating one is collective, so every rank creates every row."""
    mine = None
    for row in rows.tolist():
        if len(row) > 1:
            group = dist.new_group(row)
            mine = group if dist.get_rank() in row else mine
    return mine
