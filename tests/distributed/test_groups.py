"""ParallelGroups: the grid's layout is Megatron's, and the collectives that move bytes move the right ones."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_rlvr.config import ConfigError
from megatron_rlvr.distributed import collect, groups
from megatron_rlvr.distributed.groups import ParallelGroups
from tests.ranks import run_ranks


def _members(group) -> list[int]:
    return dist.get_process_group_ranks(group) if group is not None else [dist.get_rank()]


def _describe(g: ParallelGroups) -> dict:
    sizes = [f"{way}_{what}" for way in ("tp", "pp", "dp", "cp") for what in ("rank", "size")]
    names = (*sizes, "rank", "world_size", "is_last_stage")
    members = {name: _members(getattr(g, name)) for name in ("tp", "pp", "dp", "cp", "world")}
    return members | {name: getattr(g, name) for name in names}


def test_single_is_one_rank_everywhere():
    g = ParallelGroups.single()
    assert (g.tp, g.pp, g.dp, g.cp, g.world) == (None,) * 5
    assert (g.tp_size, g.cp_size, g.pp_size, g.dp_size, g.world_size, g.tp_rank, g.rank) == (1, 1, 1, 1, 1, 0, 0)
    assert g.is_last_stage


@pytest.mark.parametrize("tp, pp, dp, cp", [(2, 2, 1, 1), (1, 2, 2, 1), (2, 1, 1, 2), (1, 2, 1, 2), (1, 1, 2, 2)])
def test_the_grid_is_megatrons(tp: int, pp: int, dp: int, cp: int):
    from megatron.core import parallel_state  # before the fork: one import of many seconds, not four

    def work():
        own = _describe(ParallelGroups.from_grid(tp, pp, dp, cp))
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp
        )
        return own, _describe(ParallelGroups.from_megatron())

    results = run_ranks(4, work)
    for rank, (own, megatron) in enumerate(results):
        assert own == megatron
        assert own["rank"] == rank and tuple(own[f"{way}_size"] for way in ("tp", "pp", "dp", "cp")) == (tp, pp, dp, cp)
        assert own["is_last_stage"] == (own["pp_rank"] == pp - 1)


def test_a_grid_that_does_not_fit_and_a_start_without_torchrun_say_so(monkeypatch):
    def work():
        with pytest.raises(ConfigError, match="tp=3 x cp=1 x pp=1 x dp=1 is 3 ranks, but 2 were started"):
            ParallelGroups.from_grid(tp=3)

    run_ranks(2, work)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="RANK.*torchrun"):
        groups.init(5)
    groups.destroy()  # nothing to leave: no error


def test_init_joins_from_the_environment_and_a_taken_port_is_named():
    def work():
        groups.destroy()
        groups.init(30)
        assert dist.get_world_size() == 2
        groups.destroy()
        groups.init(30)

    run_ranks(2, work)

    def taken():
        import os
        import socket

        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            holder.listen()
            os.environ["MASTER_PORT"] = str(holder.getsockname()[1])
            groups.destroy()
            with pytest.raises(ConfigError, match=f"{os.environ['MASTER_PORT']}.*free port"):
                groups.init(5)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    run_ranks(1, taken)


def test_bytes_arrive_whatever_the_dtype():
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8)

    def work():
        rank = dist.get_rank()
        for dtype in dtypes:
            mine = (torch.arange(5) * (rank + 1)).to(dtype)
            expected = torch.stack([(torch.arange(5) * (peer + 1)).to(dtype) for peer in range(3)])
            assert torch.equal(collect.all_gather_flat(mine, dist.group.WORLD), expected)
            box = mine.clone().view(5, 1)
            assert collect.broadcast_tensor(box, 2, dist.group.WORLD) is box
            assert torch.equal(box.flatten(), expected[2])
        assert collect.all_gather_flat(torch.empty(0), dist.group.WORLD).shape == (3, 0)
        assert collect.broadcast_tensor(torch.tensor(float(rank)), 1, dist.group.WORLD).item() == 1.0
        parameter = torch.nn.Parameter(torch.full((2,), float(rank)))
        collect.broadcast_tensor(parameter, 1, dist.group.WORLD)
        assert parameter.tolist() == [1.0, 1.0]

    run_ranks(3, work)


def test_alone_nothing_is_sent_and_strides_are_refused():
    flat = torch.arange(4.0)
    assert torch.equal(collect.all_gather_flat(flat, None), flat[None])
    assert collect.broadcast_tensor(flat, 0, None) is flat
    with pytest.raises(ValueError, match=r"not contiguous.*contiguous\(\)"):
        collect.all_gather_flat(torch.arange(8.0)[::2], None)
    with pytest.raises(ValueError, match="not contiguous"):
        collect.broadcast_tensor(torch.zeros(2, 3).T, 0, None)
    with pytest.raises(ValueError, match=r"takes a \[n\] tensor, not \[2, 2\]"):
        collect.all_gather_flat(torch.zeros(2, 2), None)
