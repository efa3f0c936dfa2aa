"""What the math verifier costs and how often it is right: python tools/bench_verify.py [--data DIR] [--rows 10000]

Three measurements, a JSON line each. ``labelled``: accuracy on the hand-labelled cases of tests/verifiers, beside
math-verify by itself (its defaults on the whole response, behind the same deadline) and DAPO's rule. ``integers``:
plain integer answers per second of CPU time, workers and pool together. ``mixed``: a file of gold answers (of the
benchmarks under DIR, else integers), right, wrong and hostile, through verify_file: the longest row beside
the wall deadline, and the largest worker beside its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_rlvr.verdict import is_right
from megatron_rlvr.verifiers import is_scored
from megatron_rlvr.verifiers.answer_text import last_boxes, read_gold
from megatron_rlvr.verifiers.pool import WALL, VerifierPool
from megatron_rlvr.verifiers.worker import MEMORY
from megatron_rlvr.verify_file import verify_file

MEASUREMENTS = ("labelled", "integers", "mixed")
LABELLED = Path(__file__).resolve().parents[1] / "tests/verifiers/labelled_math.yaml"
ALONE = """
import math_verify
from megatron_rlvr.verdict import Verdict
ISOLATED = True
def read_answer(value):
    return str(value)
def verify(response, answer):
    gold = math_verify.parse("$" + answer.strip("$") + "$", parsing_timeout=None)
    given = math_verify.parse(response, parsing_timeout=None)
    return Verdict(float(math_verify.verify(gold, given, timeout_seconds=None)), "ok")
"""
# What is sent to break a verifier; @ is the gold answer.
HOSTILE = (
    "9**9**9", "9^{9^{9^{9^9}}}", "(9!)!", "99999999!", "10^{999999999}", "2^{2^{2^{2^{2}}}}", "7" * 1_000_000,
    r"\sqrt{" * 300 + "2" + "}" * 300, r"\sqrt{2+" * 11 + "2" + "}" * 11, "1+" * 500_000 + "1", r"\frac{",
    r"\left( @", "−@", "三角形的面积是@", "@ or @1", r"@} \boxed{@1", "", "@\0", "\0", r"\text{" * 40,
    r"\int_0^{\infty} e^{-x^2} dx", r"\sum_{n=1}^{10^9} n", "__import__('time').sleep(99)", "x" * 900, "(" * 900,
    "[" * 400 + "1" + "]" * 400,
    "\\" * 999, r"\begin{pmatrix}" + "1&" * 300, r"\cos^{1000}(x)+\sin^{1000}(x)", r"(x+y+z)^{400}",
    r"\prod_{k=1}^{9999}(x+k)",
    "1," * 450, r"\binom{99999}{49999}", r"\frac{1}{\frac{1}{0}}", "\ud800", "\u202e@", "@." + "9" * 900,
    r"\sin(\cos(\tan(\sin(\cos(\tan(x^x^x))))))", r"\sqrt[99]{x^{99}+1}-\sqrt[98]{x}", r"e^{e^{e^{e^{79}}}}",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--data", default=os.environ.get("MEGATRON_RLVR_DATA", ""), help="folder with eval/*.jsonl")
    parser.add_argument("--rows", type=int, default=10_000, help="of the mixed file (default: %(default)s)")
    parser.add_argument("--integers", type=int, default=20_000, help="plain answers (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=0, help="labelled cases; 0: all (default)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=3.0, help="CPU seconds per answer (default: %(default)s)")
    parser.add_argument("--only", choices=MEASUREMENTS, help="one of the measurements")
    options = parser.parse_args()
    for name in [options.only] if options.only else MEASUREMENTS:
        measurement = {"labelled": labelled, "integers": integers, "mixed": mixed}[name]
        print(json.dumps({"measurement": name, **measurement(options)}), flush=True)
    return 0


def cases() -> Iterator[tuple[str, str, bool]]:
    """(response, gold, whether it is right) of the labelled set."""
    for groups in yaml.safe_load(LABELLED.read_text()).values():
        for group in groups:
            for key in ("right", "wrong", "right_text", "wrong_text"):
                for text in group.get(key, []):
                    boxed = text if key.endswith("_text") else rf"So it is $\boxed{{{text}}}$."
                    yield boxed, group["gold"], key.startswith("right")


def labelled(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy, false positives, false negatives, and verdicts that a deadline or an error took, per verifier."""
    chosen = list(cases())
    chosen = random.Random(0).sample(chosen, options.cases) if options.cases else chosen
    items = [(response, read_gold(gold)) for response, gold, _ in chosen]
    figures: dict[str, Any] = {"cases": len(chosen), "right": sum(right for *_, right in chosen)}
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder, "math_verify_alone.py")
        alone.write_text(ALONE)
        for title, name in (("math", "math"), ("math_verify_alone", str(alone)), ("dapo", "dapo")):
            with VerifierPool(name, options.workers, options.deadline) as pool:
                verdicts = pool.score(items)
            said = [is_right(verdict) is True for verdict in verdicts]
            truth = [right for *_, right in chosen]
            figures[title] = {
                "accuracy": round(sum(a == b for a, b in zip(said, truth, strict=True)) / len(chosen), 4),
                "false_positives": sum(a and not b for a, b in zip(said, truth, strict=True)),
                "false_negatives": sum(b and not a for a, b in zip(said, truth, strict=True)),
                "unscored": sum(not is_scored(verdict) for verdict in verdicts),
            }
    return figures


def integers(options: argparse.Namespace) -> dict[str, Any]:
    """Plain integer answers, half of them wrong, at the end of a text of some length; one worker."""
    draw = random.Random(0)
    items = [
        ("We compute. " * 100 + rf"So the answer is $\boxed{{{number}}}$.", str(number + index % 2))
        for index, number in enumerate(draw.randrange(10**6) for _ in range(options.integers))
    ]
    before, started = cpu_seconds(), time.perf_counter()
    with VerifierPool("math", 1, options.deadline) as pool:
        rewards = [verdict.reward for verdict in pool.score(items)]
    wall, cpu = time.perf_counter() - started, cpu_seconds() - before
    assert rewards == [float(index % 2 == 0) for index in range(len(items))]
    return {
        "rows": len(items),
        "rows_per_cpu_second": round(len(items) / cpu),
        "rows_per_second": round(len(items) / wall),
    }


def mixed(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        with source.open("w") as file:
            for row in rows(options):
                file.write(json.dumps(row) + "\n")
        started = time.perf_counter()
        counts = verify_file(source, target, "math", workers=options.workers, deadline=options.deadline)
        wall = time.perf_counter() - started
        scored = [json.loads(line) for line in target.open()]
    by_kind: dict[str, list[float]] = {}
    for row in scored:
        by_kind.setdefault(row["kind"], []).append(row["reward"])
    return {
        "rows": len(scored),
        "seconds": round(wall, 1),
        "statuses": dict(counts),
        "rewarded": {kind: f"{sum(rewards):g} of {len(rewards)}" for kind, rewards in sorted(by_kind.items())},
        "worst_row_seconds": round(max(row["seconds"] for row in scored), 2),
        "wall_deadline_seconds": WALL * options.deadline,
        "largest_worker_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10,
        "memory_limit_mib": MEMORY,
    }


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Half right, four in ten wrong, one in ten hostile."""
    draw, found = random.Random(0), golds(options.data)
    for index in range(options.rows):
        gold, kind = draw.choice(found), draw.choices(("right", "wrong", "hostile"), (5, 4, 1))[0]
        if kind == "right":
            text = draw.choice((gold, f" {gold}.", f"${gold}$"))
        elif kind == "wrong":
            text = draw.choice(
                (f"{gold}+1", f"{gold} or {gold}", rf"1={gold}+1", rf"\text{{not }} {gold}", f"{gold}, 0, 1")
            )
        else:
            text = draw.choice(HOSTILE).replace("@", gold)
        yield {
            "response": rf"<think>\boxed{{0}}</think> So \boxed{{{text}}}",
            "answer": gold,
            "kind": kind,
            "id": index,
        }


def golds(folder: str) -> list[str]:
    """The gold answers of every eval/*.jsonl, whatever the field; integers where there is no folder."""
    found = []
    for path in sorted(Path(folder, "eval").glob("*.jsonl")) if folder else []:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            gold = next((row[key] for key in ("answer", "expected_answer", "final_answer") if key in row), None)
            gold = gold[0] if isinstance(gold, list) else gold if gold is not None else last_boxes(row["solution"])
            found.append(read_gold(gold))
    return found or [str(number) for number in range(-50, 1000)]


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


if __name__ == "__main__":
    sys.exit(main())
