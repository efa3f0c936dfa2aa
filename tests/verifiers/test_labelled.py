"""The math verifier on cases labelled by hand: no false positive, and hardly a right answer turned away."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import yaml

from megatron_rlvr.verifiers import dapo
from megatron_rlvr.verifiers.math import read_answer
from megatron_rlvr.verifiers.pool import VerifierPool

GROUPS = yaml.safe_load(Path(__file__).with_name("labelled_math.yaml").read_text())


def cases() -> list[tuple[str, str, str, bool]]:
    """(category, response, gold, whether it is right)."""
    found = []
    for category, groups in GROUPS.items():
        for group in groups:
            for key in ("right", "wrong", "right_text", "wrong_text"):
                for text in group.get(key, []):
                    response = text if key.endswith("_text") else rf"So it is $\boxed{{{text}}}$."
                    found.append((category, response, group["gold"], key.startswith("right")))
    return found


def test_no_false_positive_and_an_accuracy_above_97_percent() -> None:
    labelled = cases()
    assert len(labelled) >= 300 and len(GROUPS) >= 12
    with VerifierPool("math", workers=2, deadline=20.0) as pool:
        verdicts = pool.score([(response, read_answer(gold)) for _, response, gold, _ in labelled])
    farmed = [case for case, verdict in zip(labelled, verdicts, strict=True) if verdict.reward and not case[3]]
    missed = [case for case, verdict in zip(labelled, verdicts, strict=True) if not verdict.reward and case[3]]
    assert farmed == []
    assert len(missed) <= 0.03 * len(labelled), missed
    assert Counter(verdict.status for verdict in verdicts).keys() <= {"ok", "unparseable"}


def test_dapos_rule_takes_answer_lines_and_no_equation_for_an_answer() -> None:
    def reward(response: str, gold: str) -> float:
        return dapo.verify(response, dapo.read_answer(gold)).reward

    right = [("Answer: 25", "025"), ("Answer: 27", "27.0"), ("Answer: $1,234$", "1234"), ("Answer: 5 \\text{ cm}", "5")]
    boxes = [
        r"\boxed{34}",
        r"$\boxed{34}$",
        r"\(\boxed{34}\)",
        r"**$\boxed{34}$**",
        r"$\boxed{34}$.",
        r"\boxed{34 \text{ cm}}",
    ]
    right += [(f"Answer: {box}", "34") for box in boxes] + [(r"Answer: \boxed{\frac{1}{2}}", r"\frac12")]
    assert [reward(response, gold) for response, gold in right] == [1.0] * len(right)
    assert reward("Answer: 3\nso\nAnswer: 4.", "4") == 1.0
    wrong = [("Answer: 1 = 7", "7"), ("Answer: 34 or 35", "34"), ("\\boxed{7}", "7"), ("Answer: 7" + " " * 400, "7")]
    boxes = [
        r"35 or \boxed{34}",
        r"\boxed{34} or \boxed{35}",
        r"\boxed{34}, \boxed{35}",
        r"\boxed{34, 35}",
        r"\boxed{34",
        "34}",
    ]
    boxes += [
        r"not \boxed{34}",
        r"1 = \boxed{34}",
        r"\boxed{34}+\frac{1}{2}",
        r"\boxed{34}\text{ or }35",
        r"\boxed{35}",
    ]
    wrong += [(f"Answer: {box}", "34") for box in boxes]
    assert [reward(response, gold) for response, gold in wrong] == [-1.0] * len(wrong)
    assert dapo.verify("7", "7").status == "unparseable"
