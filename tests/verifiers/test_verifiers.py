"""Finding verifiers, and what becomes of their verdicts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlvr import verifiers
from megatron_rlvr.config import Config, ConfigError, DataConfig, ModelConfig, check
from megatron_rlvr.types import Prompt, Rollout, RolloutGroup
from megatron_rlvr.verdict import Verdict, is_right
from megatron_rlvr.verifiers.pool import VerifierPool

OK, UNPARSEABLE = Verdict(0.75, "ok"), Verdict(0.0, "unparseable")
TIMEOUT, ERROR = Verdict(0.0, "timeout", message="not done"), Verdict(0.0, "error", message="KeyError: 'x'")


def test_every_shipped_verifier_is_found_by_its_file_name():
    """And no other file of their folder passes for one: a new verifier needs no line here, a new helper one there."""
    files = Path(verifiers.__file__).parent.glob("*.py")
    assert verifiers.names() == sorted(file.stem for file in files if "\ndef verify(" in file.read_text())
    assert {"countdown", "format", "math"} <= set(verifiers.names())
    for name in verifiers.names():
        assert verifiers.load(name).verify.__module__ == f"megatron_rlvr.verifiers.{name}"


def test_the_readme_has_a_row_for_every_verifier():
    table = (
        Path(__file__).parents[2].joinpath("README.md").read_text().partition("| `verifier` |")[2].partition("\n\n")[0]
    )
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == verifiers.names()


@pytest.mark.parametrize("name, closest", [("maths", "math"), ("count_down", "countdown"), ("pool", ""), ("", "")])
def test_an_unknown_verifier_names_the_closest_and_all(name, closest):
    with pytest.raises(ConfigError, match="unknown verifier") as raised:
        verifiers.load(name)
    assert f"did you mean '{closest}" in str(raised.value) and ", ".join(verifiers.names()) in str(raised.value)


def test_a_verifier_can_be_a_file_of_ones_own(tmp_path):
    own = tmp_path / "length.py"
    own.write_text(
        "from dataclasses import dataclass\nfrom megatron_rlvr.verdict import Verdict\nISOLATED = False\n"
        "@dataclass\nclass Limit:\n    characters: int\n"
        "def read_answer(value): return int(value)\n"
        "def verify(response, answer): return Verdict(float(len(response) <= answer), 'ok')\n"
    )
    with VerifierPool(str(own), workers=1, deadline=1.0) as pool:
        assert [verdict.reward for verdict in pool.score([("abc", 3), ("abcd", 3)])] == [1.0, 0.0]
    with pytest.raises(ConfigError, match="no such file"):
        verifiers.load(str(tmp_path / "absent.py"))
    own.write_text("ISOLATED = False\ndef verify(response, answer): ...\n")
    with pytest.raises(ConfigError, match="lacks read_answer"):
        verifiers.load(str(own))
    own.write_text("ISOLATED = False\nfrom nowhere import verify\n")
    with pytest.raises(ConfigError, match="verifier '.*' cannot be loaded: .*/length.py, line 2: ModuleNotFoundError"):
        verifiers.load(f"1*{own} + 1*format")


def test_the_readmes_verifier_works_as_it_stands_there(tmp_path):
    _, section = Path(__file__).parents[2].joinpath("README.md").read_text().split("## Verifiers", 1)
    own = tmp_path / "exact.py"
    own.write_text(section.split("```python\n")[1].split("```")[0])
    verifier = verifiers.load(str(own))
    verdicts = [verifier.verify(text, verifier.read_answer(7)) for text in ("so Answer: 7", "Answer: 8", "so 7")]
    assert [(verdict.reward, verdict.status) for verdict in verdicts] == [(1, "ok"), (0, "ok"), (0, "unparseable")]


def test_a_shipped_verifier_that_cannot_be_imported_is_one_error(monkeypatch):
    monkeypatch.delitem(sys.modules, "megatron_rlvr.verifiers.math", raising=False)
    monkeypatch.setitem(sys.modules, "math_verify", None)  # what Python itself uses for "cannot be imported"
    with pytest.raises(
        ConfigError, match=r"verifier 'math' cannot be loaded: .*/math.py, line \d+: ModuleNotFoundError"
    ):
        verifiers.load("math")


def test_a_sum_of_verifiers():
    both = verifiers.load("0.9*math + 0.1*format")
    assert both.ISOLATED and verifiers.load("1*countdown").ISOLATED is False
    answer = both.read_answer(34.0)
    assert answer == ["34", None]
    rewards = {
        r"so</think> \boxed{34}": 1.0,
        r"so</think> \boxed{35}": 0.1,
        r"\boxed{34}": 0.9,
        "34": 0.0,
    }
    verdicts = [both.verify(response, answer) for response in rewards]
    assert [verdict.reward for verdict in verdicts] == pytest.approx(list(rewards.values()))
    assert [verdict.status for verdict in verdicts] == ["ok", "ok", "ok", "unparseable"]
    assert [verdict.extracted for verdict in verdicts][:3] == ["34", "35", "34"]
    with VerifierPool("2 * math+1e-1*format", workers=1, deadline=20.0) as pool:
        assert pool.score([(r"so</think> \boxed{34}", answer)])[0].reward == pytest.approx(2.1)
    for wrong, message in {
        **dict.fromkeys(
            (
                "math + format",
                "0.9*math + format",
                "math + 0.1*format",
                "math*0.9",
                "0,9*math + 0,1*format",
                "1..5*math",
            ),
            "a sum has a number and . before each of its verifiers, as in '0.9.math . 0.1.format'",
        ),
        "math + own.py": "'math . own.py': a sum has",
        "0.5*math + 0.5*fromat": "did you mean 'format'",
        "1*math + 0*format": "weight of format must be above 0, not 0",
    }.items():
        with pytest.raises(ConfigError, match=message):
            verifiers.load(wrong)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.5), (0.9, 0.1)])
def test_a_sum_is_right_where_its_first_verifier_says_so(weights):
    first, second = weights
    for name, answer, right in (("countdown", "5*7+3", "5*7+3"), ("dapo", "34", "Answer: 34")):
        both = verifiers.load(f"{first}*{name} + {second}*format")
        gold = both.read_answer({"numbers": [3, 5, 7], "target": 38} if name == "countdown" else answer)
        formatted = verifiers.judge(both, "so</think> no answer", gold)
        assert is_right(formatted) is False and formatted.reward == pytest.approx(second - first * (name == "dapo"))
        unformatted = verifiers.judge(both, right, gold)
        assert is_right(unformatted) is True and unformatted.reward == pytest.approx(first)


def test_what_is_right_where_no_sum_is(tmp_path):
    assert [is_right(verdict) for verdict in (OK, UNPARSEABLE, TIMEOUT, ERROR)] == [True, False, None, None]
    assert is_right(Verdict(0.5, "ok")) is False and is_right(Verdict(9.0, "timeout", right=True)) is None
    own = tmp_path / "graded.py"  # a verifier whose reward is not 1 where the answer is right
    own.write_text(
        "from megatron_rlvr.verdict import Verdict\nISOLATED = True\ndef read_answer(value): return value\n"
        "def verify(response, answer): return Verdict(10.0, 'ok', right=response == answer)\n"
    )
    with VerifierPool(str(own), workers=1, deadline=5.0) as pool:
        assert [is_right(verdict) for verdict in pool.score([("a", "a"), ("b", "a")])] == [True, False]


def test_a_part_that_fails_leaves_the_sum_without_reward(tmp_path):
    own = tmp_path / "failing.py"
    own.write_text(
        "from megatron_rlvr.verdict import Verdict\nISOLATED = False\ndef read_answer(value): return value\n"
        "def verify(response, answer): return Verdict(1.0, 'timeout', message='busy')\n"
    )
    verdict = verifiers.judge(verifiers.load(f"0.5*format + 0.5*{own}"), "a</think> b", [None, "x"])
    assert (verdict.reward, verdict.status, verdict.message) == (0.0, "timeout", "busy")
    assert is_right(verdict) is None


def test_a_verifier_that_this_machine_cannot_run_says_so_before_anything_starts(tmp_path):
    own = tmp_path / "needs.py"
    own.write_text(
        "from megatron_rlvr.config import ConfigError\nISOLATED = True\ndef read_answer(value): return value\n"
        "def verify(response, answer): ...\ndef check_host(): raise ConfigError('needs an abacus')\n"
    )
    for name in (str(own), f"1*math + 1*{own}"):
        with pytest.raises(ConfigError, match="abacus"):
            VerifierPool(name, workers=1, deadline=1.0)
    verifiers.check_host(verifiers.load("math"))


def test_a_signed_scale_is_not_laid_over_dapo():
    smallest = Config(verifier="dapo", model=ModelConfig(path="m"), data=DataConfig(path="d", max_prompt_length=64))
    check(smallest)
    smallest.reward.scale = "signed"
    with pytest.raises(ConfigError, match="verifier=dapo gives -1 and .1 already"):
        check(smallest)


def test_rewards_and_their_scales():
    assert verifiers.reward_of(OK, "verifier") == 0.75 and verifiers.reward_of(OK, "signed") == 0.5
    assert verifiers.reward_of(UNPARSEABLE, "verifier") == 0.0 and verifiers.reward_of(UNPARSEABLE, "signed") == -1.0
    assert [verifiers.is_scored(verdict) for verdict in (OK, UNPARSEABLE, TIMEOUT, ERROR)] == [True, True, False, False]
    for verdict in (TIMEOUT, ERROR):
        for scale in ("verifier", "signed"):
            with pytest.raises(ValueError, match="has no reward"):
                verifiers.reward_of(verdict, scale)


def test_failures_are_counted_and_too_many_stop_the_run():
    verdicts = [OK] * 17 + [UNPARSEABLE, TIMEOUT, ERROR]
    assert verifiers.count_statuses(verdicts) == {"ok": 17, "unparseable": 1, "timeout": 1, "error": 1}
    assert verifiers.count_statuses([]) == {"ok": 0, "unparseable": 0, "timeout": 0, "error": 0}
    verifiers.check_error_share(verdicts, 0.1)  # exactly the limit
    verifiers.check_error_share([], 0.0)
    with pytest.raises(verifiers.VerifierError) as raised:
        verifiers.check_error_share(verdicts[2:], 0.1)
    parts = ["2 of 18", "11.1%", "max_error_share=0.1", "1 errors, 1 timeouts", "timeout: not done", "reward.deadline"]
    assert [part for part in parts if part not in str(raised.value)] == []
    with pytest.raises(verifiers.VerifierError, match="KeyError: 'x'"):
        verifiers.check_error_share([OK, ERROR], 0.0)


@pytest.mark.parametrize(
    "returned, message",
    [
        ("1.0", "not a Verdict"),
        ("Verdict(1.0, 'fine')", "not a Verdict with a known status"),
        ("Verdict(float('nan'), 'ok')", "the reward nan"),
        ("Verdict(None, 'ok')", "TypeError"),
        ("Verdict(1.0, 'ok', extracted=5)", "TypeError: verify returned extracted=5, which must be text or None"),
        ("Verdict(1.0, 'ok', message=None)", "verify returned message=None, which must be text"),
        ("Verdict(1.0, 'ok', right='no')", "verify returned right='no', which must be a bool or None"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_whatever_a_verifier_does_wrong_is_an_error_status(tmp_path, returned, message):
    own = tmp_path / "wrong.py"
    own.write_text(
        "from megatron_rlvr.verdict import Verdict\nISOLATED = False\n"
        f"def read_answer(value): return value\ndef verify(response, answer): return {returned}\n"
    )
    verdict = verifiers.judge(verifiers.load(str(own)), "response", None)
    assert verdict.status == "error" and message in verdict.message and verdict.seconds > 0


def test_score_groups_fills_every_verdict_in_place():
    def group(name: str, target: int, texts: list[str]) -> RolloutGroup:
        prompt = Prompt(name, "", (1,), "countdown", {"numbers": [2, 3], "target": target})
        return RolloutGroup(prompt, [Rollout(i, [1], [0.0], "stop", 0, text) for i, text in enumerate(texts)])

    groups = [group("a/1", 5, ["2+3", "2*3"]), group("a/2", 6, ["2+3", "3*2", "six"])]
    with VerifierPool("countdown", workers=2, deadline=1.0) as pool:
        verifiers.score_groups(groups, pool)
    rewards = [[rollout.verdict.reward for rollout in group.rollouts] for group in groups]
    assert rewards == [[1.0, 0.0], [0.0, 1.0, 0.0]]
    assert groups[1].rollouts[2].verdict.status == "unparseable"


def test_a_verifier_process_imports_neither_torch_nor_megatron_nor_vllm():
    code = (
        "import sys, megatron_rlvr.verifiers.worker as worker, megatron_rlvr.verifiers as verifiers\n"
        "[verifiers.load(name) for name in verifiers.names()]\n"
        "print(sorted({'torch', 'megatron', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "[]"
