"""The order in which prompts come: epochs of a weighted mixture, a pure function of (seed, epoch)."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Order:
    """Parts of ``sizes`` prompts, numbered through; part i has ``counts[i]`` places in every epoch.

    Order(sizes=(4, 10), counts=(8, 5)): each of prompts 0 .. 3 twice per epoch, each of 4 .. 13 in every second one.
    With weight 0.7 or 3.7 every epoch holds a prompt 0 or 1, 3 or 4 times, and after no epoch is one of a
    part more than one ahead of another.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def weighted(cls, sizes: list[int], weights: list[float]) -> Order:
        """A part of weight w has w times as many places per epoch as it has prompts, rounded, and at least one."""
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

    Which ones: each part goes round and round one permutation of its prompts, and an epoch takes the next so many. As
    many in a row hold each prompt as often as any other, or once more, in this epoch and in all so far. A permutation
    per round would not do: an epoch that begins in one round and ends in the next could hold a prompt from both.
    In which order: shuffled anew in every epoch, all parts together.
    """
    prompts: list[int] = []
    offset = 0
    for part, (size, count) in enumerate(zip(order.sizes, order.counts, strict=True)):
        ring = _ring(size, seed, part)
        prompts += [offset + ring[place % size] for place in range(epoch * count, (epoch + 1) * count)]
        offset += size
    if seed is not None:
        random.Random(f"{seed}/{epoch}").shuffle(prompts)
    return prompts


@functools.lru_cache(maxsize=16)
def _ring(size: int, seed: int | None, part: int) -> list[int]:
    numbers = list(range(size))
    if seed is not None:
        random.Random(f"{seed}/part {part}").shuffle(numbers)
    return numbers
