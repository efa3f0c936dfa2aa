"""The test bench itself: results, the first failure, the deadline, and that no process is left."""

from __future__ import annotations

import os
import subprocess
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def test_returns_each_ranks_result_in_rank_order():
    def work(offset: int):
        total = torch.tensor([float(dist.get_rank() + offset)])
        dist.all_reduce(total)
        return dist.get_rank(), total, os.environ["RANK"], os.environ["WORLD_SIZE"]

    for rank, (own, total, name, size) in enumerate(run_ranks(3, work, 10)):
        assert (own, total.item(), name, size) == (rank, 33.0, str(rank), "3")


def test_raises_the_exception_that_came_first_and_not_its_consequences():
    def work():
        if dist.get_rank() == 1:
            raise KeyError("the cause")
        dist.barrier()

    with pytest.raises(KeyError, match="the cause") as caught:
        run_ranks(3, work, timeout=60)
    assert "rank 1" in str(caught.value.__cause__) and "in work" in str(caught.value.__cause__)


def test_a_rank_that_dies_silently_is_named():
    def work():
        if dist.get_rank() == 1:
            os._exit(3)
        dist.barrier()

    with pytest.raises(RuntimeError, match="rank 1 died"):
        run_ranks(2, work, timeout=60)


def test_the_deadline_ends_ranks_and_what_they_started():
    left = []

    def work(path: str):
        child = subprocess.Popen(["sleep", "300"])
        with open(f"{path}.{dist.get_rank()}", "w") as file:
            file.write(str(child.pid))
        time.sleep(300)

    path = f"/dev/shm/ranks-test-{os.getpid()}"
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\](.|\n)*in work"):
        run_ranks(2, work, path, timeout=4)
    assert time.monotonic() - start < 20
    for rank in range(2):
        with open(f"{path}.{rank}") as file:
            left.append(int(file.read()))
        os.unlink(f"{path}.{rank}")
    deadline = time.monotonic() + 10
    while any(_running(pid) for pid in left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in left if _running(pid)]


def _running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
