"""Every gold answer of the seven benchmark files: right in a box and as a plain number, wrong when changed."""

from __future__ import annotations

import os
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_rlvr.prompt_files import read_rows
from megatron_rlvr.verifiers.answer_forms import canonical, number, split_unit
from megatron_rlvr.verifiers.answer_text import last_boxes
from megatron_rlvr.verifiers.math import read_answer
from megatron_rlvr.verifiers.pool import VerifierPool

DATA = os.environ.get("MEGATRON_RLVR_DATA", "")
FIELDS = {
    "aime24": ("answer", 30),
    "aime25": ("expected_answer", 30),
    "amc23": ("answer", 40),
    "math500": ("answer", 500),
    "minerva": ("solution", 272),
    "olympiadbench": ("final_answer", 675),
    "gsm8k_test": ("answer", 1319),
}


def golds(name: str) -> list[str]:
    field, count = FIELDS[name]
    values = [row[field] for _, row in read_rows(Path(DATA, f"eval/{name}.jsonl"))]
    assert len(values) == count
    if name == "minerva":
        values = [last_boxes(value) for value in values]
    return [read_answer(value[0] if isinstance(value, list) else value) for value in values]


def written(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def rewritten(gold: str) -> list[str]:
    """A number in its plain form: without separators, leading zeros, unit or power of ten."""
    exact = number(split_unit(canonical(gold))[0])
    return [] if exact is None else [written(exact)]


def changed(gold: str) -> list[str]:
    """The gold answer with another value: a number plus one or a ten-thousandth, a text with another digit and more."""
    exact = number(split_unit(canonical(gold))[0])
    if exact is not None:
        others = {exact + 1, 10 * exact + 1, -exact - 1, exact + Fraction(exact or 1) / 10_000} - {exact}
        return [written(value) for value in others]
    digits = list(re.finditer("[0-9]", gold))
    other_digits = [
        gold[: digit.start()] + str(int(digit.group()) % 9 + 1) + gold[digit.end() :]
        for digit in {*digits[:1], *digits[-1:]}
    ]
    return [*other_digits, f"{gold}+1", f"2({gold})", f"{gold}, 1", rf"\text{{not }}{gold}"]


def check(found: list[str]) -> None:
    given = [(text, gold) for gold in found for text in (gold, *rewritten(gold))]
    right = [(rf"<think>\boxed{{0}}</think> So it is $\boxed{{{text}}}$.", gold) for text, gold in given]
    wrong = [(rf"So it is $\boxed{{{text}}}$.", gold) for gold in found for text in changed(gold)]
    with VerifierPool("math", workers=2, deadline=20.0) as pool:
        verdicts = pool.score(right + wrong)
    assert [pair for pair, verdict in zip(right, verdicts, strict=False) if verdict.reward != 1.0] == []
    farmed = [pair for pair, verdict in zip(wrong, verdicts[len(right) :], strict=True) if verdict.reward != 0.0]
    assert farmed == []
    assert [verdict for verdict in verdicts if verdict.status not in ("ok", "unparseable")] == []


@pytest.mark.real_data
def test_integer_golds_and_a_sample_of_the_others():
    integers = [gold for name in ("aime24", "aime25", "amc23", "gsm8k_test") for gold in golds(name)]
    assert "025" in golds("aime24") and "27" in golds("amc23") and len(integers) == 1419
    others = golds("math500") + golds("minerva") + golds("olympiadbench")
    rows = [row["reward_model"]["ground_truth"] for _, row in read_rows(Path(DATA, "train/dapo_math_17k.parquet"))]
    draw = random.Random(0)
    check([*integers, "np.arcsin(10/13)", *draw.sample(others, 60), *map(read_answer, draw.sample(rows, 400))])


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["math500", "minerva", "olympiadbench"])
def test_every_gold(name):
    check(golds(name))
