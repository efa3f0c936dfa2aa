"""Every countdown puzzle over three numbers 1-9, and its right answers: plain Python, nothing drawn at random.

A puzzle is a set of three numbers (repeats allowed, order ignored) and a target of at least 1 that some expression
with + - * and each number once reaches, without parentheses: ``3,5,7=38>`` is answered by ``5*7+3``.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations_with_replacement, permutations, product


@dataclass(frozen=True)
class Puzzle:
    """Puzzle(numbers=(3, 5, 7), target=38, answers=("3+5*7", "3+7*5", "5*7+3", "7*5+3"))"""

    numbers: tuple[int, int, int]
    target: int
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return f"{','.join(map(str, self.numbers))}={self.target}>"

    def row(self) -> dict:
        """What a line of the data set holds."""
        return {"prompt": self.prompt, "answer": {"numbers": list(self.numbers), "target": self.target}}


def all_puzzles() -> list[Puzzle]:
    """The 1,386 puzzles, by numbers and target."""
    answers = defaultdict(set)
    for numbers in combinations_with_replacement(range(1, 10), 3):
        for (a, b, c), (first, second) in product(permutations(numbers), product("+-*", repeat=2)):
            target = _value(a, first, b, second, c)
            if target >= 1:
                answers[numbers, target].add(f"{a}{first}{b}{second}{c}")
    return [Puzzle(numbers, target, tuple(sorted(right))) for (numbers, target), right in sorted(answers.items())]


def _value(a: int, first: str, b: int, second: str, c: int) -> int:
    """a first b second c, products before sums."""
    if first == "*":
        return _apply(a * b, second, c)
    if second == "*":
        return _apply(a, first, b * c)
    return _apply(_apply(a, first, b), second, c)


def _apply(left: int, sign: str, right: int) -> int:
    return left * right if sign == "*" else left + right if sign == "+" else left - right
