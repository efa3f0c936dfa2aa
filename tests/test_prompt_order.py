"""The order of prompts: every epoch whole, weights kept, and the exact next prompt after any kill."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_rlvr.config import DataConfig, SourceConfig
from megatron_rlvr.prompt_order import Order
from megatron_rlvr.prompts import load_prompts
from megatron_rlvr.verifiers import load

DEADLINE = 60.0  # seconds for what takes milliseconds


def sequence(order: Order, start: int, n: int, seed: int = 7, shuffle: bool = True) -> list[int]:
    return [order.at(place, seed, shuffle) for place in range(start, start + n)]


def test_the_order_is_a_pure_function_of_the_position() -> None:
    order = Order.weighted([23], [1.0])
    whole = sequence(order, 0, 100)
    for start, n in ((99, 1), (0, 5), (20, 8), (23, 23), (41, 59), (50, 0)):
        assert sequence(Order.weighted([23], [1.0]), start, n) == whole[start : start + n]
    epochs = [whole[start : start + 23] for start in range(0, 92, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and list(range(23)) not in epochs
    assert sequence(order, 0, 100, seed=8) != whole
    assert sequence(order, 20, 6, shuffle=False) == [20, 21, 22, 0, 1, 2]


def test_equal_weights_give_every_prompt_once_per_epoch() -> None:
    order = Order.weighted([4, 10, 3], [1.0, 1.0, 1.0])
    for epoch in range(5):
        assert sorted(sequence(order, epoch * 17, 17)) == list(range(17))


def test_weights_are_appearances_per_epoch() -> None:
    order = Order.weighted([4, 10, 3], [2.0, 0.5, 1.0])
    assert len(order) == 8 + 5 + 3
    for epoch in range(4):
        counts = Counter(sequence(order, epoch * 16, 16))
        assert all(counts[prompt] == 2 for prompt in range(4)) and all(counts[prompt] == 1 for prompt in (14, 15, 16))
        assert sum(counts[prompt] for prompt in range(4, 14)) == 5
    for first in (0, 2):  # what one epoch leaves out of the second part comes in the next
        assert all(Counter(sequence(order, first * 16, 32))[prompt] == 1 for prompt in range(4, 14))
    long = Counter(sequence(order, 0, 16 * 100))
    assert {long[prompt] for prompt in range(4)} == {200} and {long[prompt] for prompt in range(4, 14)} == {50}
    assert len(Order.weighted([10], [0.001])) == 1  # never nothing


PARTS = st.lists(
    st.tuples(st.integers(1, 41), st.integers(3, 37).map(lambda tenths: tenths / 10)), min_size=1, max_size=3
)


@given(PARTS, st.integers(0, 5), st.booleans())
@example([(1000, 0.7)], 0, True)
@example([(23, 2.5), (7, 0.3), (1, 3.7)], 1, True)
def test_every_epoch_holds_a_prompt_as_its_weight_says(
    parts: list[tuple[int, float]], seed: int, shuffle: bool
) -> None:
    order = Order.weighted(*map(list, zip(*parts, strict=True)))
    so_far: Counter = Counter()
    for epoch in range(12):
        prompts = sequence(order, epoch * len(order), len(order), seed, shuffle)
        counts, first = Counter(prompts), 0
        so_far += counts
        for size, weight in parts:
            of_part = range(first, first + size)
            assert {counts[prompt] for prompt in of_part} <= {math.floor(weight), math.ceil(weight)}
            assert max(so_far[prompt] for prompt in of_part) - min(so_far[prompt] for prompt in of_part) <= 1
            first += size


@pytest.mark.parametrize("weight", [1.0, 2.0, 0.5])
def test_an_epoch_is_shuffled_anew(weight: float) -> None:
    order = Order.weighted([40], [weight])
    epochs = [sequence(order, epoch * len(order), len(order)) for epoch in range(8)]
    assert len(set(map(tuple, epochs))) == 8 and epochs[0] != sorted(epochs[0])
    firsts = [epoch.index(epochs[index % 2][0]) for index, epoch in enumerate(epochs)]
    assert len(set(firsts)) > 4  # nor is one epoch the other, begun elsewhere
    assert sequence(order, 0, len(order), seed=8) != epochs[0]


def test_parts_are_mixed() -> None:
    order = Order.weighted([500, 500], [1.0, 1.0])
    first = sum(prompt < 500 for prompt in sequence(order, 0, 200))
    assert 70 < first < 130  # about 3 standard deviations either side
    halves = sequence(Order.weighted([40, 40], [0.5, 0.5]), 0, 40)
    assert {prompt for prompt in halves if prompt < 40} != {prompt - 40 for prompt in halves if prompt >= 40}


class Words:
    """A tokenizer of one token per character."""

    def __call__(self, texts: list[str], **_: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


PROMPTS, PER_STEP, EPOCHS = 53, 8, 12  # more than 20 * 3 steps, so that every kill finds one left


def _be_rank(folder: Path, rank: int, ranks: int, start: int, die_at: int) -> None:
    """One rank of a run: loads the data anew, takes its share step by step, and dies by SIGKILL before ``die_at``."""
    data = DataConfig(template="raw")
    prompts = load_prompts([SourceConfig(str(folder / name)) for name in ("a.jsonl", "b.jsonl")], data, Words(), "math")
    with open(folder / f"rank_{rank}.log", "w", buffering=1) as log:
        for position in range(start, PROMPTS * EPOCHS, PER_STEP):
            if position >= die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            step = prompts.take(position, min(PER_STEP, PROMPTS * EPOCHS - position), seed=3, shuffle=True)
            print(position, *(prompt.id for prompt in step[rank::ranks]), file=log)


def _run(folder: Path, ranks: int, start: int, victim: int, die_at: int) -> bool:
    """A run from prompt ``start``; True when the victim was killed, and the other ranks with it wherever they were."""
    for log in folder.glob("rank_*.log"):
        log.unlink()
    context = multiprocessing.get_context("fork")
    members = [
        context.Process(target=_be_rank, args=(folder, rank, ranks, start, die_at if rank == victim else 10**9))
        for rank in range(ranks)
    ]
    for member in members:
        member.start()
    members[victim].join(DEADLINE)
    killed = members[victim].exitcode == -signal.SIGKILL
    for member in members:
        if killed:
            member.kill()
        member.join(DEADLINE)
    assert all(member.exitcode == 0 for member in members) or killed
    return killed


def _committed(folder: Path, ranks: int, start: int) -> list[str]:
    """The prompts of the steps that every rank has done, in the order of the steps: what a checkpoint counts."""
    logs = [folder / f"rank_{rank}.log" for rank in range(ranks)]
    steps = [[line.split() for line in log.read_text().splitlines()] if log.exists() else [] for log in logs]
    taken: list[str] = []
    for of_ranks in zip(*steps, strict=False):
        assert {line[0] for line in of_ranks} == {str(start + len(taken))}, "a step was skipped or came twice"
        shares = [line[1:] for line in of_ranks]
        taken += [shares[place % ranks][place // ranks] for place in range(sum(map(len, shares)))]
    return taken


@pytest.mark.parametrize("layouts", [(1,), (2,), (4,), (1, 2, 4)])
def test_killed_twenty_times_and_every_prompt_once_per_epoch(tmp_path: Path, layouts: tuple[int, ...]) -> None:
    """One rank is killed at a random step, the others are anywhere then; the last layouts change with every resume."""
    for name, rows in (("a", 40), ("b", PROMPTS - 40)):
        lines = [f'{{"problem": "{name}{index}", "answer": "{index}"}}\n' for index in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    load("math")  # once: its imports take each rank longer than all else
    draw = random.Random(len(layouts))
    taken: list[str] = []
    for kill in range(21):
        ranks, start = layouts[kill % len(layouts)], len(taken)
        die_at = start + PER_STEP * draw.randint(0, 3) if kill < 20 else 10**9
        killed = _run(tmp_path, ranks, start, draw.randrange(ranks), die_at)
        assert killed == (kill < 20)
        taken += _committed(tmp_path, ranks, start)
    assert len(taken) == PROMPTS * EPOCHS
    epochs = [taken[start : start + PROMPTS] for start in range(0, len(taken), PROMPTS)]
    assert all(len(set(epoch)) == PROMPTS for epoch in epochs)
