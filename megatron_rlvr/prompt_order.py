"""The order in which prompts come: epochs of a weighted mixture, a pure function of (seed, epoch)."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Order:
    """Parts of ``sizes`` prompts, numbered through; part i has ``counts[i]`` places in every epoch.

    Order(sizes=(4, 10), counts=(8, 5)): each of prompts 0 .. 3 twice per epoch, each of 4 .. 13 in every second one.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def weighted(cls, sizes: list[int], weights: list[float]) -> Order:
        """A part of weight w has w times as many places per epoch as it has prompts, at least one."""
        pairs = zip(sizes, weights, strict=True)
        return cls(tuple(sizes), tuple(max(1, round(weight * size)) for size, weight in pairs))

    def __len__(self) -> int:
        """Places per epoch."""
        return sum(self.counts)

    def at(self, place: int, seed: int, shuffle: bool) -> int:
        """The prompt at a place of the endless sequence of epochs."""
        epoch, index = divmod(place, len(self))
        return _epoch(self, seed if shuffle else None, epoch)[index]


@functools.lru_cache(maxsize=4)
def _epoch(order: Order, seed: int | None, epoch: int) -> list[int]:
    """The prompts of one epoch; without a seed as they are numbered.

    Each part goes through its own prompts in rounds, however its rounds lie to the epochs: with weight 0.5 the second
    epoch takes those that the first left out.
    """
    prompts: list[int] = []
    offset = 0
    for part, (size, count) in enumerate(zip(order.sizes, order.counts, strict=True)):
        for place in range(epoch * count, (epoch + 1) * count):
            turn, index = divmod(place, size)
            prompts.append(offset + _round(size, seed, part, turn)[index])
        offset += size
    if seed is not None:
        random.Random(f"{seed}/{epoch}").shuffle(prompts)
    return prompts


@functools.lru_cache(maxsize=16)
def _round(size: int, seed: int | None, part: int, turn: int) -> list[int]:
    numbers = list(range(size))
    if seed is not None:
        random.Random(f"{seed}/{part}/{turn}").shuffle(numbers)
    return numbers
