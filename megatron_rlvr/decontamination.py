"""Which rows of a training set are problems of a benchmark: the same words, or most of a problem's n-grams.

index = Index(n=10)
index.add("math500/7", "What is $1+1$?")
index.matches("what is \\( 1 + 1 \\)", least_share=0.5) -> [Match("math500/7", exact=True, share=1.0)]
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from megatron_rlvr.benchmarks import Benchmark, flag, source
from megatron_rlvr.config import SourceConfig, rule
from megatron_rlvr.prompt_files import read_rows, source_name
from megatron_rlvr.prompt_rows import RowError, find_field, read_question
from megatron_rlvr.verifiers.answer_forms import squeeze

# What changes how a formula looks and not what it says.
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|q?quad|[bB]igg?[lr]?|mathrm|text|mbox|operatorname)(?![a-zA-Z])"
    r"|\\[,;:!\\ ]|\\[()\[\]]|[$~&]"
)
_SPELLINGS = (
    (r"\\[dt]frac(?![a-zA-Z])", r"\\frac"), (r"\\(le|ge)(?:q|qslant)?(?![a-zA-Z])", r"\\\1q "),
    ("≤", r"\\leq "), ("≥", r"\\geq "), ("−", "-"),
)  # fmt: skip
# A Chinese, Japanese or Korean letter is a word; so is a sign, for x + 1 is another problem than x - 1.
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힣]|[^\W_぀-ヿ㐀-鿿가-힣]+|[-+=<>^/*|!]")
# A problem of fewer words is found if it is exact, for one or two stand in many texts. The shortest of the published
# benchmarks have three, and none of 34,000 training rows holds them by chance.
_LEAST = 3


class Match(NamedTuple):
    """A benchmark's problem that a training row holds."""

    problem: str
    exact: bool  # the same words, once layout is taken away
    share: float  # of the problem's n-grams that the row has too


class Index:
    """Problems by their words; ``n`` is the length of an n-gram, or that of the whole problem where it is shorter."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._exact: dict[str, list[str]] = defaultdict(list)
        self._holders: dict[tuple[str, ...], list[str]] = defaultdict(list)
        self._sizes: dict[str, int] = {}
        self._lengths: set[int] = set()

    def add(self, problem: str, text: str) -> None:
        """``problem`` is the id that matches name."""
        spoken = words(text)
        self._exact[_letters(spoken)].append(problem)
        if len(spoken) < _LEAST:
            return
        length = min(self.n, len(spoken))
        grams = _grams(spoken, length)
        self._lengths.add(length)
        self._sizes[problem] = len(grams)
        for gram in grams:
            self._holders[gram].append(problem)

    def matches(self, text: str, least_share: float) -> list[Match]:
        """The problems that a training text is, or holds at least ``least_share`` of the n-grams of; worst first."""
        spoken = words(text)
        exact = self._exact.get(_letters(spoken), [])
        grams = set().union(*(_grams(spoken, length) for length in self._lengths))
        shared = Counter(problem for gram in grams for problem in self._holders.get(gram, ()))
        found = [Match(problem, True, 1.0) for problem in exact]
        for problem, count in shared.items():
            share = count / self._sizes[problem]
            if share >= least_share and problem not in exact:
                found.append(Match(problem, False, share))
        return sorted(found, key=lambda match: (not match.exact, -match.share, match.problem))


def _grams(spoken: tuple[str, ...], length: int) -> set[tuple[str, ...]]:
    return {spoken[start : start + length] for start in range(len(spoken) - length + 1)}


def _letters(spoken: tuple[str, ...]) -> str:
    """What is the same however it is spaced: x y + z and xy+z, but not 1 23 and 12 3."""
    return squeeze(" ".join(spoken))


def words(text: str) -> tuple[str, ...]:
    """The words and signs of a text, layout taken away: r"If $\\left(x\\right)=1$" -> ("if", "x", "=", "1")."""
    text = unicodedata.normalize("NFKC", text)
    for spelling, usual in _SPELLINGS:
        text = re.sub(spelling, usual, text)
    return tuple(_WORD.findall(_LAYOUT.sub(" ", text).lower()))


class Row(NamedTuple):
    """A row of a data set and what it asks; ``question`` is None where it asks nothing that can be read."""

    number: int
    row: Any
    question: str | None


class Found(NamedTuple):
    """A training row that holds problems of a benchmark."""

    row: str
    matches: list[Match]
    question: str


def questions(data: SourceConfig, key: str) -> Iterator[Row]:
    """Every row of a source.

    Raises ConfigError: it cannot be read, or its first row has no prompt; ``key`` is what names the field.
    """
    field = ""
    for number, row in read_rows(data.path):
        question = None
        if isinstance(row, dict):
            field = field or find_field(row, data, "prompt_field", "", key)
            with suppress(RowError):  # no run trains on such a row: load_prompts drops it, with the reason
                question = read_question(row, field)
        yield Row(number, row, question)


def index_benchmarks(benchmarks: Sequence[Benchmark], folder: str, n: int) -> tuple[Index, dict[str, str]]:
    """Every problem of the benchmarks, and the texts of those that may be shown by their ids NAME/ROW.

    Raises ConfigError: what ``questions`` raises, and a benchmark without a problem, which would find nothing.
    """
    index = Index(n)
    texts: dict[str, str] = {}
    for benchmark in benchmarks:
        rows = questions(source(benchmark, folder), flag(benchmark, "benchmark_field"))
        problems = {f"{benchmark.name}/{row.number}": row.question for row in rows if row.question is not None}
        rule(bool(problems), f"{benchmark.title}: there is no problem in it to look for")
        for problem, question in problems.items():
            index.add(problem, question)
        texts |= problems if benchmark.shown else {}
    return index, texts


def check(data: SourceConfig, index: Index, least_share: float) -> tuple[list[Row], list[Found]]:
    """The rows of a training set that hold no problem, and those that do."""
    clean, found = [], []
    for row in questions(data, "--prompt-field"):
        matches = index.matches(row.question, least_share) if row.question is not None else []
        if matches:
            found.append(Found(f"{source_name(data.path)} row {row.number}", matches, row.question or ""))
        else:
            clean.append(row)
    return clean, found
