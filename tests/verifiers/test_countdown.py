"""The countdown verifier against an evaluator that shares nothing with it."""

from __future__ import annotations

import ast
import itertools
import operator
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.verifiers.countdown import read_answer, verify

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def independent_value(text: str) -> Fraction:
    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        assert isinstance(node, ast.BinOp)
        return OPERATORS[type(node.op)](value(node.left), value(node.right))

    return value(ast.parse(text, mode="eval").body)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), numbers=st.lists(st.integers(0, 99), min_size=1, max_size=6))
def test_agrees_with_an_independent_evaluator(data, numbers):
    order = data.draw(st.permutations(numbers))
    signs = data.draw(st.lists(st.sampled_from("+-*"), min_size=len(numbers) - 1, max_size=len(numbers) - 1))
    text = "".join(itertools.chain.from_iterable(itertools.zip_longest(map(str, order), signs, fillvalue="")))
    target = int(independent_value(text))
    assert verify(text, {"numbers": numbers, "target": target}).reward == 1.0
    assert verify(f" {text}\n", {"numbers": numbers, "target": target}).reward == 1.0
    missed = verify(text, {"numbers": numbers, "target": target + 1})
    assert (missed.reward, missed.status, missed.extracted) == (0.0, "ok", text)
    assert verify(text, {"numbers": [*numbers, 1], "target": target}).reward == 0.0  # a number left over
    assert verify(f"{text}+0", {"numbers": numbers, "target": target}).reward == 0.0  # a number too many


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="0123456789+-*() \n.x/", max_size=12))
def test_any_text_gets_a_verdict_and_only_true_ones_a_reward(text):
    verdict = verify(text, {"numbers": [2, 3], "target": 6})
    if verdict.reward:
        assert independent_value(text.strip()) == 6 and sorted(c for c in text if c.isdigit()) == ["2", "3"]


def test_each_number_exactly_once_and_the_usual_precedence():
    answer = {"numbers": [3, 5, 7], "target": 38}
    for right in ("5*7+3", "3+7*5", "7*5+3"):
        assert verify(right, answer).reward == 1.0
    for wrong in ("38", "35+3", "5*7", "5*7+3+3-3", "5*7+3*1", "3*5+7", "5*7+30-27"):
        verdict = verify(wrong, answer)
        assert (verdict.reward, verdict.status) == (0.0, "ok")
    assert verify("5*5+5", {"numbers": [5, 5], "target": 30}).reward == 0.0
    assert verify("5*5+5", {"numbers": [5, 5, 5], "target": 30}).reward == 1.0
    assert verify("2-3*4", {"numbers": [2, 3, 4], "target": -10}).reward == 1.0
    assert verify("2-3-4", {"numbers": [2, 3, 4], "target": -5}).reward == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "(5*7)+3",
        "5*7+3=38",
        "-5+3",
        "5**7+3",
        "5 * 7 + 3",
        "5*7+",
        "5//7+3",
        "5.0*7+3",
        "٥*7+3",
        "5_0",
        "1e3",
        "__import__('os').system('true')",
        "9" * 5000,
        "9**9**9",
        "5*7+3\n5*7+3",
    ],
)
def test_what_is_not_an_expression_is_unparseable(text):
    verdict = verify(text, {"numbers": [3, 5, 7], "target": 38})
    assert (verdict.reward, verdict.status, verdict.extracted) == (0.0, "unparseable", None) and verdict.message


def test_long_responses_cost_linear_work():
    text = "+".join(["999999999"] * 20_000)
    assert verify(text, {"numbers": [3], "target": 3}).status == "ok"
    assert verify("1*" * 20_000, {"numbers": [3], "target": 3}).status == "unparseable"


def test_answers_of_data_rows_are_checked():
    assert read_answer({"numbers": [3, 5, 7], "target": 38}) == {"numbers": [3, 5, 7], "target": 38}
    for value in ("38", 38, {}, {"numbers": [], "target": 1}, {"numbers": [1.5], "target": 1}, {"numbers": [1]}):
        with pytest.raises(ValueError):
            read_answer(value)
    with pytest.raises(ValueError, match="integer"):
        read_answer({"numbers": [True], "target": 1})
