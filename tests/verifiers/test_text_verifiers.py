"""The verifiers that read text alone: GSM8K, multiple choice, knights and knaves, form."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_rlvr.prompt_files import read_rows
from megatron_rlvr.verifiers import choice, dapo, format, gsm8k, kk

DATA = os.environ.get("MEGATRON_RLVR_DATA", "")


def test_gsm8k():
    gold = gsm8k.read_answer("70 + 2 = 72\nso it goes\n#### 1,027")
    right = [
        "so\n#### 1027",
        "#### $1,027",
        "#### 1027.00",
        r"\boxed{1027}",
        "Answer: 1027 dollars",
        "#### $1027 per hour",
        r"#### \$1027 per hour",
        "#### 1027 miles per hour",
        "#### 1027 years old",
        "#### 1027 lbs",
        "#### €1027",
        "#### 5\n#### 1027.",
        "#### 1027<|im_end|>",
        r"#### \boxed{1027}",
        r"#### $\boxed{1,027}$.",
        "#### **1027**",
        "#### Step 1: the 5 boxes\n5\n#### Step 2\nSo it is \\boxed{1027}.",
        "So \\boxed{1027} clips\n#### Step 3: verification",
        "#### Answer\nAnswer: 1027",
        "#### 1. Cost\n5\n#### 2. Conclusion\nSo it is \\boxed{1027}.",
        "#### 5 Conclusion\nSo it is \\boxed{1027}.",
        "#### (a) the first part\n##### Step\n#### **2. Add**\n\\boxed{1027}",
        "#### 1027\n\n#### Verification",
        "#### 5) Conclusion\nAnswer: 1027",
        "\\boxed{5}\n#### 1027.\n",
        "#### \n\\boxed{1027}",
        "#### **Result** 5\n\\boxed{1027}",
    ]
    wrong = [
        "#### 1028",
        "#### 1,27",
        "#### 1027\n#### 1028",
        "#### 1027 thousand",
        "#### -1027",
        "#### " + "9" * 10_000,
        "\\boxed{1027}\n#### 1028",
        "#### Step 1027\n\\boxed{1028}",
        r"#### \boxed{1028}",
    ]
    unreadable = [
        "1027",
        "it is 1027",
        "#### ",
        "#### 1027 or 1028",
        "<think>#### 1027",
        "#### 1000 + 27",
        "#### 1027\n#### 1027 or 1028",
        "#### 1027\n#### No, 1028",
        "\\boxed{1027}\n#### 1027 or 1028",
        r"#### 1028 or \boxed{1027}",
        r"#### \boxed{1027} or \boxed{1028}",
        r"#### not \boxed{1027}",
        r"#### 1 = \boxed{1027}",
        "#### Step 1027",
        "#### Step 2: 1027",
    ]
    assert [gsm8k.verify(response, gold).reward for response in right] == [1.0] * len(right)
    assert [gsm8k.verify(response, gold).reward for response in wrong] == [0.0] * len(wrong)
    assert [gsm8k.verify(response, gold).status for response in unreadable] == ["unparseable"] * len(unreadable)
    for value in ("no number", "", None, "#### x"):
        with pytest.raises(ValueError):
            gsm8k.read_answer(value)


def test_choice():
    right = [
        "B",
        "B.",
        "(B)",
        "b",
        r"\text{B}",
        r"\textbf{(B)}",
        "B) 34 m/s",
        "B: the second",
        "option B",
        r"\text{(B)}",
        "$B$",
        "Ｂ",
        "B) I and II",
        "B) not enough data",
        "B: because A and C are wrong",
        "B. 3 or 4",
        "B) one or a few",
        "(B) Iron and Carbon",
    ]
    wrong = ["A", "C.", "(D)", r"\text{J}", "C) I and II", "C: because A and B are wrong", "A: neither, not B as such"]
    unreadable = [
        "A or B",
        "B or C",
        "B, C",
        "BC",
        "not B",
        "AB",
        "",
        "34",
        "B) or C)",
        "B. C. D.",
        "K",
        "Because",
        r"B\\C",
        "B) not A",
        "B) or C",
        "B: this or C",
        "B: this or (C)",
        "B: this, or C that",
        "B) and C are right",
        "B: this and C",
        "B) this and (C).",
        "B) but not A",
        "B. Or A.",
        "B) or possibly C",
        "B: this or maybe C, who knows",
        "B: this and maybe C",
        "B: not sure, maybe C",
        "B, or C",
        r"B: \text{or C}",
        "B) this\nor\nC",
        "C) or B",
        "B/C",
        "{B, C}",
    ]
    assert [choice.verify(rf"so \boxed{{{text}}}", "B").reward for text in right] == [1.0] * len(right)
    for text in wrong:
        verdict = choice.verify(rf"so \boxed{{{text}}}", "B")
        assert (verdict.reward, verdict.status) == (0.0, "ok")
    for text in unreadable:
        verdict = choice.verify(rf"so \boxed{{{text}}}", "B")
        assert (verdict.reward, verdict.status) == (0.0, "unparseable"), text
    assert choice.verify("Answer: (B)", "B").reward == choice.verify("t</think><answer>B</answer>", "B").reward == 1.0
    assert choice.verify("It is B", "B").status == choice.verify("B", "B").status == "unparseable"
    assert [choice.read_answer(value) for value in ("(c)", "C.", r"\text{(C)}")] == ["C"] * 3
    for value in ("", "yes", "BC", 3):
        with pytest.raises(ValueError):
            choice.read_answer(value)


KNIGHTS = {"Amelia": "knight", "Evelyn": "knave"}


@pytest.mark.parametrize(
    "response, reward",
    [
        ("t</think><answer> (1) Amelia is a knight\n(2) Evelyn is a knave </answer>", 1.0),
        ("Amelia is a knight, and Evelyn is a knave.", 1.0),
        (r"\boxed{\text{Amelia: knight, Evelyn: knave}}", 1.0),
        ("<answer>**Amelia** is a **knight**; **Evelyn** is a **knave**</answer>", 1.0),
        ("<answer>amelia = Knight, evelyn = Knave</answer>", 1.0),
        ("Amelia is a knave. <answer>Amelia is a knight, Evelyn is a knave</answer>", 1.0),
        ("<answer>Amelia is the knight and Evelyn is the knave</answer>", 1.0),
        ("<answer>Amelia must be a knight. Evelyn must be a knave.</answer>", 1.0),
        ("<answer>Amelia must be a knave. Evelyn must be a knave.</answer>", 0.0),
        ("<answer>Amelia is not the knight, Evelyn is the knave</answer>", 0.0),
        ("<answer>Amelia is a knave, Evelyn is a knight</answer>", 0.0),
        ("<answer>Amelia is a knight</answer>", 0.0),
        ("<answer>Amelia is a knight, Amelia is a knave, Evelyn is a knave</answer>", 0.0),
        ("<answer>Amelia is not a knight, Evelyn is a knave</answer>", 0.0),
        ("<answer>Amelia is a knight or a knave, Evelyn is a knave, Evelyn is a knight</answer>", 0.0),
        (
            "<answer>Amelia is a knight, Evelyn is a knave</answer><answer>Amelia is a knave</answer>",
            0.0,
        ),
        ("<think>Amelia is a knight, Evelyn is a knave", 0.0),
    ],
)
def test_knights_and_knaves(response, reward):
    assert kk.verify(response, KNIGHTS).reward == reward


def test_knights_and_knaves_answers():
    text = "(1) Amelia is a knight\n(2) Evelyn is a knave"
    for value in (text, {"solution_text_format": text, "statements": "..."}, {"Amelia": "Knight", "Evelyn": "knave"}):
        assert kk.read_answer(value) == KNIGHTS
    for value in ("", "nobody", 3, {}, {"Amelia": "queen"}):
        with pytest.raises(ValueError):
            kk.read_answer(value)
    assert kk.verify("no idea", KNIGHTS).status == kk.verify("Amelia " * 9000, KNIGHTS).status == "unparseable"


@pytest.mark.parametrize(
    "response, reward",
    [
        ("a thought</think> an answer", 1.0),
        ("<think>a thought</think>\nan answer<|im_end|>", 1.0),
        ("a thought</think> <answer> 5 </answer>", 1.0),
        ("a thought</think><answer>5</answer><|endoftext|>", 1.0),
        ("", 0.0),
        ("an answer", 0.0),
        ("</think> an answer", 0.0),
        ("a thought</think>", 0.0),
        ("a thought</think> <|im_end|>", 0.0),
        ("a</think>b</think>c", 0.0),
        ("a<think>b</think>c", 0.0),
        ("a</think><answer></answer>", 0.0),
        ("a</think>so <answer>5</answer>", 0.0),
        ("a</think><answer>5</answer> and more", 0.0),
        ("a</think><answer>5", 0.0),
        ("a</think><answer>5</answer><answer>6</answer>", 0.0),
        ("<answer>5</answer></think>b", 0.0),
    ],
)
def test_form(response, reward):
    verdict = format.verify(response, format.read_answer("anything"))
    assert (verdict.reward, verdict.status) == (reward, "ok")


@pytest.mark.real_data
def test_every_gsm8k_gold_and_every_knights_and_knaves_puzzle():
    golds = [row["answer"] for _, row in read_rows(Path(DATA, "eval/gsm8k_test.jsonl"))]
    assert len(golds) == 1319
    for gold in golds:
        answer = gsm8k.read_answer(gold)
        number = int(answer.replace(",", ""))
        assert gsm8k.verify(gold, answer).reward == gsm8k.verify(f"#### {number}", answer).reward == 1.0
        assert (
            gsm8k.verify(f"#### {number + 1}", answer).reward == gsm8k.verify(f"#### {number}0.5", answer).reward == 0.0
        )
    puzzles = [row for _, row in read_rows(Path(DATA, "other/kk_3ppl_test.parquet"))]
    assert len(puzzles) == 100
    for puzzle in puzzles:
        answer = kk.read_answer(puzzle["reward_model"]["ground_truth"])
        said = puzzle["solution_text_format"]
        swapped = said.replace("knight", "-").replace("knave", "knight").replace("-", "knave")
        assert list(answer) == list(puzzle["names"])
        assert kk.verify(f"t</think><answer>{said}</answer>", answer).reward == 1.0
        assert kk.verify(puzzle["solution_text"], answer).reward == 1.0
        assert kk.verify(f"t</think><answer>{swapped}</answer>", answer).reward == 0.0


@pytest.mark.timeout(300)  # a second; quadratic time is days
@pytest.mark.parametrize("verifier, gold", [(gsm8k, "5"), (choice, "B"), (kk, KNIGHTS), (format, None), (dapo, "5")])
def test_long_texts_cost_linear_work(verifier, gold):
    """These run in the trainer's own process: text that takes quadratic time would stop the run for hours."""
    n = 1_000_000
    texts = [
        " " * n + "x",
        "<answer>" * (n // 8),
        r"\boxed{" * (n // 7),
        r"\boxed{1}" * (n // 9),
        r"\boxed{1}" + " " * n + r"x\boxed{2}",
        "5" + "<|im_end|>" * (n // 10),
        "<|" * (n // 2),
        "answer" * (n // 6),
        "Answer" + " " * n + "5",
        "####" * (n // 4),
        "Amelia is a " * (n // 12),
        "A-" * (n // 2),
        "<think>" * (n // 7),
    ]
    assert all(verifier.verify(text, gold).reward <= 0 for text in texts)
