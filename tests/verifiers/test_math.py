"""The math verifier: which answer is final, what equals what, and text that attacks it."""

from __future__ import annotations

import psutil
import pytest
import sympy.parsing.sympy_parser as sympy_parser

from megatron_rlvr.verifiers import judge, math
from megatron_rlvr.verifiers.math import final_answer, read_answer, verify
from megatron_rlvr.verifiers.pool import VerifierPool


@pytest.mark.parametrize(
    "response, answer",
    [
        (r"so \boxed{34}", "34"),
        (r"first \boxed{1}, no, \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2^{10}}} and done", r"\frac{1}{2^{10}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \mid x > 0 \right\}}", r"\left\{ x \mid x > 0 \right\}"),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{$7$.}", "7"),
        (r"<think>\boxed{1}</think> It is \boxed{2}", "2"),
        (r"guess \boxed{1}</think>Answer: 2", "2"),
        (r"<think>a</think>\boxed{3}<think>or \boxed{4}", "3"),
        (r"\boxed{1}</think> nothing", ""),
        (r"<think> still at it, \boxed{5}", ""),
        (r"\boxed{1} then \boxed{\frac{1}{2}", ""),
        ("Work.\nAnswer: 42", "42"),
        ("Answer: 1\nOn second thoughts\nAnswer: $2$.\nBye", "2"),
        ("**Final Answer:** 42", "42"),
        ("**Answer**: \\(x+1\\)", "x+1"),
        (r"Answer: \(1\) and \(2\)", r"\(1\) and \(2\)"),
        ("答\nAnswer：42", "42"),
        ("The answer is 42", ""),
        ("Answer:   \n", ""),
        ("", ""),
    ],
)
def test_the_final_answer(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    "gold, right, wrong",
    [
        ("25", ["025", "25", "25.0", "+25", "25.", "$25$", r"\frac{50}{2}", "x=25"], ["2.5", "25.0000001", "-25"]),
        ("25", [r"25\text{ cm}", r"25^\circ", r"\textbf{25}"], [r"24\text{ cm}", "25!"]),
        ("025", ["25", "025", "0025"], ["250", "205"]),
        ("70.0", ["70", "70.00"], ["7", "700", "70.1"]),
        ("12345", ["12,345", "12{,}345", r"12\,345", r"12,\!345", "12345.0"], ["12.345", "12345.5", "12,346"]),
        ("105263157894736848", ["105263157894736848"], ["105263157894736849", "105263157894736847"]),
        ("-366", ["-366", "-366.0"], ["366"]),
        ("4.4e7", ["4.4e7", "44000000", r"4.4\times 10^7", "4.4E+7"], ["4.4e8", "4.4"]),
        (r"\frac{1}{3}", ["1/3", r"\dfrac13", r"\frac{2}{6}"], ["0.3", "3", r"\frac{1}{4}"]),
        ("np.arcsin(10/13)", [r"\arcsin(10/13)", r"\sin^{-1}\left(\frac{10}{13}\right)"], [r"\arccos(10/13)", "10/13"]),
        (r"x^2-1", ["(x-1)(x+1)", "-1+x^2"], ["x^2+1", "y^2-1"]),
        (r"\left( 3, \frac{\pi}{2} \right)", [r"(3,\pi/2)"], [r"(\pi/2,3)", r"(3,\pi)"]),
        ("1,3,5", ["5,3,1", r"\{1,3,5\}"], ["1,3", "1,3,5,7"]),
        (r"\sqrt{2}", [r"2^{1/2}", r"\frac{2}{\sqrt2}"], [r"\sqrt{3}", "1.4"]),
        (r"\frac{1}{2}", [r"{1 \over 2}", r"{\bf 0.5}", r"\sin A = {1\over2}"], [r"{2 \over 1}", r"3{1 \over 2}"]),
        ("1,027", ["1027", r"\$1027", r"\text{Total} = 1027"], ["1,27", "27, 1", "x=1,27", "1027, 1"]),
        ("81, 256", ["256,81"], ["81256", "81"]),
        ("(2,5)", ["(x,y)=(2,5)", "A=(2,5)"], ["(x,y)=(5,2)", "(1,2)=(2,5)", "(x,8)=(2,5)"]),
        (r"-2 \le x \le 7", ["[-2,7]", r"x \in [-2,7]"], ["(-2,7)", "[-2,7)", "-2,7", "[-7,2]"]),
        (r"\frac\pi4", [r"\frac{\pi}{4}", r"\frac\pi{4}", r"\dfrac{\pi}4", r"\pi/4"], [r"\frac4\pi", r"\frac\pi3"]),
        (r"\frac{\sqrt{3}}{2}", [r"\frac{\sqrt{3}}2", r"\frac{\sqrt3}2"], [r"\frac{\sqrt{3}}3", r"\frac2{\sqrt{3}}"]),
        (r"\frac1n", [r"\frac{1}{n}", r"\frac 1n"], ["n", r"\frac1m"]),
        (r"\sqrt[3]2", [r"\sqrt[3]{2}", "2^{1/3}"], [r"\sqrt2", r"\sqrt[3]3"]),
        (r"\frac16", [r"\frac{\frac12}3", r"\frac{1}{\frac{6}{1}}"], [r"\frac{1}{\frac16}"]),
        ("1/2", [r"\sin 30^\circ", r"\sin(30^{\circ})", r"\frac{\tan 45^\circ}{2}"], [r"\sin 30", r"\cos 30^\circ"]),
        (r"\tan 40^\circ", [r"\tan 40°", r"\cot 50^\circ"], [r"\tan 40", "40"]),
        ("2i", ["(1+i)^2", r"\sqrt{-4}", r"2e^{i\pi/2}"], ["-2i", "2", "(1-i)^2", "2j"]),
        ("-1", ["i^2", r"e^{i\pi}"], ["i", "i^3"]),
        (r"\frac12", [r"\frac{1}{2} hours", r"\text{0.5 hours}"], [r"\frac{1}{2} million", r"\frac{1}{2} or 3"]),
        (r"2\pi", [r"2\pi square units"], [r"2\pi plus half", r"3\pi square units"]),
        ("5", [r"\text{5 cm}", "5 miles per hour", "€5"], [r"\text{5 or 6}", r"\text{5 million}", r"\text{about 5}"]),
        (
            r"x \leq 1 \text{ or } x \geq 2",
            [r"(-\infty,1]\cup[2,\infty)", r"x \geq 2 \text{ or } x \leq 1"],
            [r"(-\infty,1)\cup[2,\infty)", r"(-\infty,1]", r"x \leq 1 \text{ and } x \geq 2"],
        ),
        (r"-1\frac{1}{3}", ["-4/3", r"-\frac43"], ["-2/3", "4/3"]),
        (r"62.5\%", ["0.625", r"62.5\%", "62.5"], ["6.25", "0.00625", r"0.625\%"]),
        ("0.625", [r"62.5\%", "5/8"], ["62.5", r"6.25\%"]),
        ("1, 1, 2", ["1, 2, 1"], ["1, 2, 2", "1, 2"]),
        ("5", ["5"], ["5/0", r"\frac{5}{0}"]),
        ("34", ["34"], ["33,34", "34 or 35", r"35\text{ or }34", "$34$ or $35$", r"34\neq 35"]),
    ],
)
def test_equality(gold, right, wrong):
    answer = read_answer(gold)
    for given in right:
        assert verify(rf"so \boxed{{{given}}}", answer).reward == 1.0, given
    for given in wrong:
        verdict = verify(rf"so \boxed{{{given}}}", answer)
        assert verdict.reward == 0.0 and verdict.status in ("ok", "unparseable"), given


@pytest.mark.parametrize(
    "response",
    [
        "no answer at all",
        r"\boxed{}",
        r"\boxed{ . }",
        r"\boxed{34 35}",
        r"\boxed{35 \quad 34}",
        r"\boxed{+ \frac}",
        r"\boxed{" + "1+" * 2000 + "1}",
        r"\boxed{" + "(" * 13 + "34" + ")" * 13 + "}",
        "Answer: 5} and \\text{or {34",
    ],
)
def test_what_holds_no_readable_answer_is_unparseable(response):
    for gold in ("34", "69"):  # 34 + 35: math-verify takes two numbers side by side for their sum
        verdict = verify(response, gold)
        assert (verdict.reward, verdict.status) == (0.0, "unparseable") and verdict.message


def test_side_by_side_numbers_that_are_one_expression_stay_readable():
    pairs = [(r"\log_2 8", "3"), (r"\frac 1 2", r"\frac{1}{2}"), (r"1\frac{1}{2}", "3/2"), ("10 000", "10000")]
    for text, gold in pairs:
        assert verify(rf"\boxed{{{text}}}", gold).reward == 1.0, text


def test_gold_answers_of_data_rows():
    golds = [27.0, "27.0", 27, " 27 ", "$27$", r"\boxed{27}", "so many\n#### 27", "70 + 2 = 72\n#### 1,027"]
    golds += ["#### Step\n#### 27"]
    assert [read_answer(gold) for gold in golds] == ["27", "27.0", "27", "27", "27", "27", "27", "1,027", "27"]
    assert read_answer(0.5) == "0.5"
    for gold in ("", "  ", None, True, ["1"], {"a": 1}):
        with pytest.raises(ValueError):
            read_answer(gold)


def test_a_gold_answer_that_cannot_be_read_is_compared_as_text():
    gold = "np.arcsin(10/13)"
    assert verify(r"\boxed{np.arcsin(10/13)}", gold).reward == 1.0
    assert verify(r"\boxed{np.arcsin(10 / 13)}", gold).reward == 1.0
    assert verify(r"\boxed{np.arcsin(11/13)}", gold).reward == 0.0
    assert verify(r"\boxed{7}", r"\frac{a}{}").reward == 0.0


def test_the_grammar_must_read_all_of_a_text():
    # math-verify's own parse takes 2/3 for both sides here, and 7/1000 of a longer one
    gold = read_answer(r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}")
    assert verify(rf"\boxed{{{gold}}}", gold).reward == 1.0
    assert verify(r"\boxed{\frac{1}{3} E_{1}+\frac{2}{3} E_{3}}", gold).reward == 0.0
    assert verify(r"\boxed{2 M}", "2 m").reward == 0.0


def test_a_gold_answer_without_a_value_is_the_data_rows_fault_and_no_wrong_answer():
    for gold, given in [("(-3)!", r"\cot 0"), ("(-3)!", "5"), ("5", "(-3)!")]:
        verdict = judge(math, rf"\boxed{{{given}}}", gold)
        assert (verdict.reward, verdict.status) == (0.0, "error" if gold == "(-3)!" else "ok")


CODE = "__import__('os').system('touch {proof}')"


@pytest.mark.parametrize(
    "shell",
    [
        "{code}",
        r"\text{{{code}}}",
        r"\operatorname{{{code}}}",
        "f({code},2)",
        r"\gcd({code}, 2)",
        "x_{{{code}}}",
        "`{code}`",
        '"{code}"',
        "lambda: {code}",
        "1 if {code} else 2",
    ],
)
@pytest.mark.parametrize("form", [r"\boxed{{{text}}}", "Answer: {text}"])
def test_code_in_an_answer_is_never_run(tmp_path, monkeypatch, shell, form):
    evaluated = []
    original = sympy_parser.eval_expr
    monkeypatch.setattr(sympy_parser, "eval_expr", lambda code, *rest: evaluated.append(code) or original(code, *rest))
    proof = tmp_path / "proof"
    text = shell.format(code=CODE.format(proof=proof))
    verdict = verify(form.format(text=text), "34")
    assert verdict.reward == 0.0 and not proof.exists()
    assert all("import" not in code and "system" not in code for code in evaluated)


RUNAWAY = r"\boxed{(x+y+z)^{99}(x-y+w)^{98}}"


def test_a_runaway_answer_meets_the_deadline_and_the_pool_lives_on():
    with VerifierPool("math", workers=1, deadline=1.0) as pool:
        items = [(r"\boxed{1}", "1"), (RUNAWAY, "x+y"), (r"\boxed{\frac{4}{2}}", "2")]
        verdicts = pool.score(items)
        assert [verdict.status for verdict in verdicts] == ["ok", "timeout", "ok"]
        assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 1.0]
        assert pool.score(items[2:])[0].reward == 1.0
    assert psutil.Process().children(recursive=True) == []


@pytest.mark.parametrize(
    ("response", "found"),
    [("Answer:\n7", "7"), ("**Answer:**\n\n$7$\nSo", "7"), ("Answer: 7\n8", "7"), ("Answer:", ""), ("Answer:\n\n", "")],
)
def test_the_answer_may_stand_below_its_line(response, found):
    assert final_answer(response) == found


def test_a_gold_that_is_a_list_in_text_is_its_one_answer():
    """As the rows of Skywork-OR1 have them."""
    assert [read_answer(text) for text in ('["7"]', r"['\\frac{1}{2}']", "[1, 2]", "['a")] == [
        "7",
        r"\frac{1}{2}",
        "[1, 2]",
        "['a",
    ]
    with pytest.raises(ValueError, match="is a list of 2, and a row has one answer"):
        read_answer('["7", "8"]')
