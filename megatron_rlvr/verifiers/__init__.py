"""Verifiers: one file each, found by its file name; a weighted sum of several is written 0.9*math + 0.1*format.

A verifier file holds ``verify(response, answer)``, ``read_answer(value)`` and ``ISOLATED``. A response whose verifier
failed (status error or timeout) has no reward at all: it is counted, left out of the loss and of its group's mean,
and too many of them stop the run. Only ok and unparseable verdicts are scored.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite  # not `import math`: loading the verifier of that name rebinds it in this package
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

from megatron_rlvr.config import ConfigError, rule
from megatron_rlvr.loading import loading
from megatron_rlvr.verdict import Verdict, VerdictStatus, is_scored
from megatron_rlvr.verifiers import combination

if TYPE_CHECKING:  # at run time these would bring torch into every verifier process
    from megatron_rlvr.types import RolloutGroup
    from megatron_rlvr.verifiers.pool import VerifierPool

# What a verdict's other parts must be, for figures, pages and files read them long after the verifier is gone.
_KINDS = {"extracted": (str | None, "text or None"), "message": (str, "text"), "right": (bool | None, "a bool or None")}
_MACHINERY = {"answer_forms", "answer_text", "combination", "jail", "pool", "sandbox", "worker"}


class VerifierError(RuntimeError):
    """The verifier itself fails, so rewards cannot be trusted."""


class Verifier(Protocol):
    """What a verifier file holds."""

    ISOLATED: bool  # True: runs in processes of its own, killed at the deadline

    def verify(self, response: str, answer: Any) -> Verdict:
        """Score one response against what ``read_answer`` returned; an exception becomes status error."""

    def read_answer(self, value: Any) -> Any:
        """A data row's answer as ``verify`` wants it, in JSON types; ValueError with the reason where it cannot be."""


def names() -> list[str]:
    """The verifiers that come with the package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _MACHINERY)


def own_files(name: str) -> list[Path]:
    """The user's own files that the verifier called ``name`` is made of."""
    parts = [part for _, part in combination.terms(name)] or [name]
    return [Path(part) for part in parts if part.endswith(".py")]


def load(name: str) -> Verifier:
    """The verifier called ``name``, the one in the Python file at that path, or a sum: "0.9*math + 0.1*format".

    Raises ConfigError: no such verifier (with the closest name), a file that lacks a part or cannot be imported (with
    the line), a sum without weights or with one of 0.
    """
    if terms := combination.terms(name):
        return combination.Combination([(weight, _load_one(part)) for weight, part in terms])
    return _load_one(name)


def _load_one(name: str) -> Verifier:
    rule(
        not re.search(r"[+*]", name) or Path(name).is_file(),
        f"verifier={name!r}: a sum has a number and * before each of its verifiers, as in '0.9*math + 0.1*format'",
    )
    if name.endswith(".py"):
        rule(Path(name).is_file(), f"verifier={name!r}: there is no such file")
        spec = importlib.util.spec_from_file_location(f"verifier_{Path(name).stem}", name)
        assert spec is not None and spec.loader is not None  # true for every .py path
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses in it look themselves up there
        with loading(f"verifier {name!r}", Path(name)):
            spec.loader.exec_module(module)
    else:
        if name not in names():
            closest = difflib.get_close_matches(name, names(), n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"unknown verifier {name!r}; did you mean {closest!r}? There are {', '.join(names())}, "
                f"the path of a Python file of your own, and sums such as '0.9*math + 0.1*format'"
            )
        with loading(f"verifier {name!r}", Path(__file__).with_name(f"{name}.py")):
            module = importlib.import_module(f"megatron_rlvr.verifiers.{name}")
    for part in ("verify", "read_answer", "ISOLATED"):
        rule(hasattr(module, part), f"verifier {name!r} lacks {part}: it must hold verify, read_answer and ISOLATED")
    return cast(Verifier, module)


def check_host(verifier: Verifier) -> None:
    """Whether this machine can run the verifier: a file may hold ``check_host()``, which raises ConfigError."""
    for part in verifier.parts if isinstance(verifier, combination.Combination) else [verifier]:
        getattr(part, "check_host", lambda: None)()


def judge(verifier: Verifier, response: str, answer: Any) -> Verdict:
    """One verdict with its wall time in seconds; whatever ``verify`` raises or returns wrongly is status error."""
    started = time.perf_counter()
    try:
        verdict = verifier.verify(response, answer)
        if not isinstance(verdict, Verdict) or verdict.status not in get_args(VerdictStatus):
            raise TypeError(f"verify returned {verdict!r}, not a Verdict with a known status")
        for part, (kind, said) in _KINDS.items():
            if not isinstance(value := getattr(verdict, part), kind):
                raise TypeError(f"verify returned {part}={value!r:.80}, which must be {said}")
        verdict = replace(verdict, reward=float(verdict.reward))
        if not isfinite(verdict.reward):
            raise ValueError(f"verify returned the reward {verdict.reward}")
    except Exception as error:  # any fault of a verifier is a counted status, not the end of the run
        verdict = Verdict(0.0, "error", message=f"{type(error).__name__}: {error}"[:500])
    return replace(verdict, seconds=time.perf_counter() - started)


def score_groups(
    groups: Sequence[RolloutGroup], pool: VerifierPool, ended: Callable[[int], Any] = lambda count: None
) -> None:
    """Fill ``rollout.verdict`` of every response; ``ended`` is told of each."""
    pairs = [(rollout, group.prompt.answer) for group in groups for rollout in group.rollouts]
    verdicts = pool.stream((rollout.text, answer) for rollout, answer in pairs)
    for (rollout, _), verdict in zip(pairs, verdicts, strict=True):
        rollout.verdict = verdict
        ended(1)


def reward_of(verdict: Verdict, scale: Literal["verifier", "signed"]) -> float:
    """The reward that trains: as the verifier gives it, or 0..1 mapped to -1..+1.

    Raises ValueError for a verdict that is not scored: a failed verifier never passes for a reward of 0.
    """
    if not is_scored(verdict):
        raise ValueError(f"a verdict of status {verdict.status} has no reward: leave out what is not is_scored()")
    return 2.0 * verdict.reward - 1.0 if scale == "signed" else verdict.reward


def count_statuses(verdicts: Sequence[Verdict]) -> dict[VerdictStatus, int]:
    """How many verdicts have each status, zeros included."""
    counts = Counter(verdict.status for verdict in verdicts)
    return {status: counts[status] for status in get_args(VerdictStatus)}


def check_error_share(
    verdicts: Sequence[Verdict],
    max_share: float,
    keys: tuple[str, str] = ("reward.max_error_share", "reward.deadline"),
) -> None:
    """Raise VerifierError where more than ``max_share`` of the verdicts are errors or timeouts.

    ``keys`` are what the user sets: the share, and the seconds that a verdict may take.
    """
    failed = [verdict for verdict in verdicts if not is_scored(verdict)]
    if len(failed) <= max_share * len(verdicts):
        return
    counts = count_statuses(verdicts)
    raise VerifierError(
        f"{len(failed)} of {len(verdicts)} responses ({len(failed) / len(verdicts):.1%}) have no reward, more than "
        f"{keys[0]}={max_share:g}: {counts['error']} errors, {counts['timeout']} timeouts; the first is "
        f"{failed[0].status}: {failed[0].message}. Mend the verifier, give timeouts more room with {keys[1]}, or "
        f"raise {keys[0]}"
    )
