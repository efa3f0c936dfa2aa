"""How fast the nodes of a job talk, measured before a run: within each node, and between each two neighbours."""

from __future__ import annotations

import statistics
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rlvr import watchdog

REPEATS = 5
PAYLOAD = {"cuda": 256 << 20, "cpu": 8 << 20}  # bytes that every rank brings to an all-reduce


class Meeting:
    """A place where ranks leave notes before any collective: whoever never comes can still be named."""

    def __init__(self, address: str, port: int, rank: int, ranks: int, patience: float) -> None:
        self.rank, self.ranks, self.patience = rank, ranks, patience
        limit = timedelta(seconds=patience)
        self.store = dist.TCPStore(address, port, ranks, is_master=rank == 0, timeout=limit, wait_for_workers=False)

    def leave_note(self, note: str) -> None:
        self.store.set(f"note/{self.rank}", note)

    def notes(self) -> dict[int, str]:
        """Rank -> its note, of those that come within the patience."""
        deadline = time.monotonic() + self.patience
        names = {rank: f"note/{rank}" for rank in range(self.ranks)}
        while time.monotonic() < deadline and not self.store.check(list(names.values())):
            time.sleep(0.1)
        return {rank: self.store.get(name).decode() for rank, name in names.items() if self.store.check([name])}

    def say(self, verdict: str) -> None:
        self.store.set("verdict", verdict)

    def hear(self) -> str:
        """What the first rank says once it has read the notes."""
        self.store.wait(["verdict"], timedelta(seconds=2 * self.patience))
        verdict = self.store.get("verdict").decode()
        self.store.add("heard", 1)
        return verdict

    def part(self, ranks: int) -> None:
        """The first rank, which holds the notes, leaves when ``ranks`` have heard the verdict."""
        deadline = time.monotonic() + self.patience
        while self.store.add("heard", 0) < ranks and time.monotonic() < deadline:
            time.sleep(0.05)

    def join(self, backend: str) -> ProcessGroup:
        """The default process group, of all ranks."""
        store = dist.PrefixStore("group", self.store)
        limit = timedelta(seconds=self.patience)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.ranks, timeout=limit)
        assert dist.group.WORLD is not None
        return dist.group.WORLD


def clock() -> float:
    """Seconds since 1970 by this machine, read on all ranks at the same moment (to some milliseconds)."""
    dist.barrier()
    return time.time()


def bandwidths(nodes: list[str], device: torch.device) -> dict[str, float]:
    """Gigabytes per second of an all-reduce that this rank took part in: {"n1": within a node, "n1+n2": between two}.

    ``nodes`` holds every rank's node, by rank. A group of one rank is not measured. Collective over all ranks.
    """
    names = list(dict.fromkeys(nodes))
    neighbours = zip(names, names[1:] + names[:1] if len(names) > 2 else names[1:], strict=False)
    rings, found = [(name,) for name in names] + list(neighbours), {}
    for members in rings:
        group = dist.new_group([rank for rank, node in enumerate(nodes) if node in members])
        if nodes[dist.get_rank()] in members and group.size() > 1:
            name = "+".join(members)
            watchdog.beat(f"all-reduce on {name}")
            found[name] = _bandwidth(group, device)
        dist.barrier()  # one ring at a time: they must not slow one another down
    return found


def _bandwidth(group: ProcessGroup, device: torch.device) -> float:
    """What one rank's link carries, whatever the number of ranks: 2 (n - 1) / n of its bytes pass it (nccl-tests)."""
    payload = torch.zeros(PAYLOAD[device.type], dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        dist.all_reduce(payload, group=group)
        payload[-1].item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    moved = 2 * (group.size() - 1) / group.size() * payload.numel()
    return moved / statistics.median(seconds[1:]) / 1e9
