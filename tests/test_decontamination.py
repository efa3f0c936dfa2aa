"""Benchmark problems in training sets: what counts as the same, and what the published files hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rlvr.benchmarks import BENCHMARKS, find
from megatron_rlvr.config import SourceConfig
from megatron_rlvr.decontamination import Index, Match, check, index_benchmarks, words

ROOT = Path(__file__).parent.parent
PROBLEM = "Let $a$ and $b$ be positive integers such that $a+b=17$ and $ab$ is as large as it can be. Find $a-b$."


@pytest.mark.parametrize(
    "same",
    [
        PROBLEM.replace("$", ""),
        PROBLEM.replace("$a+b=17$", r"\(a + b = 17\)").upper(),
        PROBLEM.replace("$a+b=17$", r"$$\left. a+b\,=17\right.$$").replace(" ", "\n "),
        PROBLEM.replace("a+b=17", "ａ＋ｂ＝１７"),
    ],
)
def test_layout_is_no_difference(same: str) -> None:
    assert words(same) == words(PROBLEM)
    index = Index(n=5)
    index.add("p/1", PROBLEM)
    assert index.matches(same, 0.5) == [Match("p/1", True, 1.0)]


def test_spacing_is_no_difference_but_between_digits() -> None:
    index = Index(n=5)
    index.add("p/1", r"Positive integers $x y+z=160$ and $x \le12$, \ge3$. What is the number $1 23$?")
    same = r"Positive integers $xy + z = 160$ and $x\leq 12$, ≥ 3$. What is the number $1 23$?"
    assert index.matches(same, 0.5) == [Match("p/1", True, 1.0)]
    assert not any(match.exact for match in index.matches(same.replace("1 23", "12 3"), 0.0))
    assert words(r"a \le b") == words(r"a \leqslant{b}") == words("a\\leq b") != words(r"a \left( b")


@pytest.mark.parametrize("other", [PROBLEM.replace("a+b=", "a-b="), PROBLEM.replace("17", "18"), PROBLEM[4:]])
def test_a_sign_or_a_number_is_a_difference(other: str) -> None:
    index = Index(n=5)
    index.add("p/1", PROBLEM)
    (match,) = index.matches(other, 0.0)
    assert not match.exact and 0 < match.share < 1


def test_the_share_is_that_of_the_problems_ngrams() -> None:
    index = Index(n=3)
    index.add("p/1", "one two three four five six")  # 4 trigrams
    index.add("p/2", "one two")
    assert index.matches("zero one two three four zero", 0.5) == [Match("p/1", False, 0.5)]
    assert index.matches("zero one two three four zero", 0.51) == []
    assert index.matches("One, two", 0.5) == [Match("p/2", True, 1.0)]
    index.add("p/3", "Simplify $\\sqrt{242}$.")  # shorter than most n-grams: then it is one
    wide = Index(n=13)
    wide.add("p/3", "Simplify $\\sqrt{242}$.")
    for text in (r"Simplify \(\sqrt{242}\). Let's think step by step.", "Solve this: simplify $\\sqrt{242}$"):
        assert wide.matches(text, 0.5) == index.matches(text, 0.5) == [Match("p/3", False, 1.0)]
    assert wide.matches(r"Simplify $\sqrt{24}$.", 0.5) == []
    wide.add("p/4", "∫")
    assert wide.matches("One, two", 0.5) == []
    assert words("三角形 abc") == ("三", "角", "形", "abc")
    both = [Match("p/1", False, 1.0)]
    assert index.matches("now one two three four five six again one two three", 0.5) == both


def test_matches_come_worst_first() -> None:
    index = Index(n=2)
    index.add("a/1", "one two three four five")
    index.add("b/1", "one two three")
    index.add("c/1", "zero one two three four")
    assert index.matches("zero one two three four", 0.5) == [
        *(Match("c/1", True, 1.0), Match("b/1", False, 1.0), Match("a/1", False, 0.75))
    ]


def test_texts_that_must_not_be_shown_are_not_handed_out(tmp_path: Path) -> None:
    """GPQA's authors ask for it: its problems are looked for, and named by their numbers alone."""
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"problem": PROBLEM, "answer": "1"}) + "\n")
    own = find(str(path))
    for shown, texts in ((True, {"own/1": PROBLEM}), (False, {})):
        index, found = index_benchmarks([replace(own, shown=shown)], "", 5)
        assert found == texts and index.matches(PROBLEM, 0.5) == [Match("own/1", True, 1.0)]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/decontaminate.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_tool_reports_every_match_and_writes_the_rest(tmp_path: Path) -> None:
    (tmp_path / "amc23.jsonl").write_text(json.dumps({"problem": PROBLEM, "answer": 1}) + "\n")
    rows = [{"prompt": "other", "answer": "1"}, {"prompt": PROBLEM.upper(), "answer": "1"}, {"prompt": None}]
    train, report, clean = tmp_path / "train.jsonl", tmp_path / "report.json", tmp_path / "clean.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{oops\n")
    asked = ["--benchmarks", "amc23", "--data", str(tmp_path), "--report", str(report)]
    done = run(str(train), *asked, "--clean", str(clean))
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == [
        "train.jsonl: 1 of 4 rows hold benchmark problems",
        "  amc23: 1 the same, 0 with 50% or more of the n-grams",
        f"{clean}: rows that cannot be read and are left out: 1",
    ]
    (match,) = json.loads(report.read_text())
    assert match == {
        "row": "train.jsonl row 2",
        "problem": "amc23/1",
        "exact": True,
        "share": 1.0,
        "text": PROBLEM.upper(),
        "problem_text": PROBLEM,
    }
    assert [json.loads(line) for line in clean.read_text().splitlines()] == [rows[0], rows[2]]
    assert run(str(clean), *asked).returncode == 0 and json.loads(report.read_text()) == []
    for path in (clean, tmp_path / "amc23.jsonl"):
        (tmp_path / f"own_{path.name}").write_text(
            path.read_text().replace('"prompt"', '"t"').replace('"problem"', '"b"')
        )
    own = [*asked, "--benchmarks", str(tmp_path / "own_amc23.jsonl")]
    for flags, says in (([], "set --benchmark-field"), (["--benchmark-field", "b"], "set --prompt-field")):
        wrong = run(str(tmp_path / "own_clean.jsonl"), *own, *flags)
        assert wrong.returncode == 2 and wrong.stderr.strip().endswith(says)
    assert run(str(tmp_path / "own_clean.jsonl"), *own, "--benchmark-field", "b", "--prompt-field", "t").returncode == 0
    (tmp_path / "empty.jsonl").write_text("")
    for arguments, says in (
        ([str(tmp_path / "none.jsonl"), *asked], "none.jsonl: there is no such file"),
        ([str(clean), *asked, "--benchmarks", str(tmp_path / "empty.jsonl")], "there is no problem in it to look for"),
        ([str(clean), *asked, "--clean", str(tmp_path / "nowhere/clean.jsonl")], "nowhere, where clean.jsonl is to be"),
        ([str(clean), *asked, "--share", "50"], "--share in (0, 1]"),
        ([str(clean), *asked, "--clean", str(clean)], "must be different files: one would replace another"),
        ([str(clean), *asked, "--report", str(clean)], "must be different files"),
        ([str(clean), *asked, "--clean", str(report)], "must be different files"),
    ):
        wrong = run(*arguments)
        assert wrong.returncode == 2 and says in wrong.stderr, wrong.stderr


def test_clean_rows_of_parquet_may_hold_dates(tmp_path: Path) -> None:
    (tmp_path / "amc23.jsonl").write_text(json.dumps({"problem": PROBLEM, "answer": 1}) + "\n")
    row = {"prompt": "other", "answer": "1", "made": datetime(2024, 7, 26, 1, 2)}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    asked = ["--benchmarks", "amc23", "--data", str(tmp_path), "--report", str(tmp_path / "report.json")]
    done = run(str(tmp_path / "train.parquet"), *asked, "--clean", str(tmp_path / "clean.jsonl"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "clean.jsonl").read_text()) == row | {"made": "2024-07-26 01:02:00"}


@pytest.mark.real_data
def test_what_the_published_training_sets_hold() -> None:
    """Two rows of DAPO are problems of MATH-500 letter for letter, eight once layout is taken away; none is AIME's.

    And MATH-500 itself is found whole, wrapped as verl's training set wraps it.
    """
    data = os.environ["MEGATRON_RLVR_DATA"]
    local = [find(name) for name, item in BENCHMARKS.items() if item.file]
    index, texts = index_benchmarks(local, f"{data}/eval", n=13)
    assert len(texts) == 30 + 30 + 40 + 500 + 675 + 272 + 1319
    exact: dict[str, Counter] = {}
    for name in ("dapo_math_17k.parquet", "math_train_7500.json", "gsm8k_train.jsonl"):
        _, found = check(SourceConfig(f"{data}/train/{name}"), index, least_share=0.5)
        same = [(row.question, match.problem) for row in found for match in row.matches if match.exact]
        exact[name] = Counter(problem.partition("/")[0] for _, problem in same)
        if name.startswith("dapo"):
            letters = {problem for question, problem in same if question == texts[problem].strip()}
            assert sum(problem.startswith("math500/") for problem in letters) == 2
            assert not any(match.problem.startswith("aime24/") for row in found for match in row.matches)
    assert exact["dapo_math_17k.parquet"] == {"amc23": 11, "math500": 8, "olympiadbench": 9}
    assert exact["math_train_7500.json"] == {"olympiadbench": 1} and exact["gsm8k_train.jsonl"] == {}
    for name, text in texts.items():
        wrapped = f"{text} Let's think step by step and output the final answer within \\boxed{{}}."
        assert name in {match.problem for match in index.matches(wrapped, least_share=0.5)}
