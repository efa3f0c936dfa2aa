"""What a step measured: exact means over microbatches and ranks, one JSON line per step, trackers that mirror it.

``metrics.jsonl`` is the record; TensorBoard, W&B and MLflow only repeat it, so losing one of them loses nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megatron_rlvr.config import LoggingConfig
from megatron_rlvr.records import JsonLines
from megatron_rlvr.trackers import Tracker, open_trackers
from megatron_rlvr.types import Prompt, Rollout, RolloutGroup
from megatron_rlvr.verdict import Verdict, is_right

Number = Tensor | float

log = logging.getLogger(__name__)


class Meter:
    """Sums and counts under metric names, so that a mean over microbatches and ranks is exact.

    meter.add("policy/entropy", entropy[mask].sum(), mask.sum())
    meter.maximum("policy/ratio_max", ratio[mask].max())

    Tensors are kept detached and become floats in one transfer, when ``sums`` or ``maxima`` is first read:
    a microbatch never waits for the device because of its metrics.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._maxima: dict[str, float] = {}
        self._pending: list[tuple[str, Number, Number | None]] = []  # count None: a maximum

    def add(self, name: str, total: Number, count: Number = 1) -> None:
        """Add ``total``, a sum over ``count`` items. Raises ValueError where one is no scalar."""
        self._pending.append((name, _scalar(name, total), _scalar(name, count)))

    def maximum(self, name: str, value: Number) -> None:
        """Keep the largest ``value`` seen. Raises ValueError where it is no scalar."""
        self._pending.append((name, _scalar(name, value), None))

    def merge(self, other: Meter) -> None:
        """Take in another meter, as if its calls had been made here."""
        for name, (total, count) in other.sums.items():
            self.add(name, total, count)
        for name, value in other.maxima.items():
            self.maximum(name, value)

    @property
    def sums(self) -> dict[str, tuple[float, float]]:
        """name -> (total, count), plain floats."""
        self._settle()
        return self._sums

    @property
    def maxima(self) -> dict[str, float]:
        """name -> largest value, plain floats."""
        self._settle()
        return self._maxima

    def means(self) -> dict[str, float]:
        """Every metric of the step: the means, then the maxima. A mean over no items is left out."""
        return {name: total / count for name, (total, count) in self.sums.items() if count} | self.maxima

    def _settle(self) -> None:
        pending, self._pending = self._pending, []
        floats = _to_floats([number for _, value, count in pending for number in (value, count) if number is not None])
        numbers = iter(floats)
        for name, _, count in pending:
            value = next(numbers)
            if count is None:
                self._maxima[name] = _larger(self._maxima.get(name), value)
            else:
                total, items = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (total + value, items + next(numbers))


def _scalar(name: str, number: Number) -> Number:
    if not isinstance(number, Tensor):
        return number
    if number.numel() != 1:
        raise ValueError(f"metric {name!r} takes sums, counts and maxima, which are scalars, not {list(number.shape)}")
    return number.detach()


def _larger(old: float | None, new: float) -> float:
    """The larger of two, where NaN wins: a maximum must not hide it."""
    return new if old is None or math.isnan(new) or new > old else old


def _to_floats(numbers: list[Number]) -> list[float]:
    """Scalars -> floats, with one device transfer for all the tensors among them."""
    tensors = [number.double().reshape(()) for number in numbers if isinstance(number, Tensor)]
    values = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(values) if isinstance(number, Tensor) else float(number) for number in numbers]


class MetricsWriter:
    """One line per step in RUN/metrics.jsonl, mirrored to the trackers that the config names. One rank holds it.

    with MetricsWriter(run_dir, config.logging, name=config.name, config=to_dict(config)) as writer:
        writer.write(1, {"reward/mean": 0.21, "sync/verified": True})

    ``resume_step`` is the step of the checkpoint that the run goes on from; what was logged after it is dropped.
    Raises ConfigError: a tracker is asked for that is not installed or does not start.
    """

    def __init__(
        self, run_dir: Path, settings: LoggingConfig, name: str = "", config: dict | None = None, resume_step: int = 0
    ) -> None:
        self._lines = JsonLines(run_dir / "metrics.jsonl", resume_step)
        self._non_finite: set[str] = set()
        self._trackers = open_trackers(run_dir, settings, name, config or {}, resume_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log one step. NaN and infinity, which JSON lacks, are written as null and named in a warning once."""
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
        self._lines.write({"step": step} | plain)
        self._warn_non_finite(
            step, {name for name, value in plain.items() if isinstance(value, float) and not math.isfinite(value)}
        )
        self.mirror(step, plain)

    def mirror(self, step: int, values: Mapping[str, Any]) -> None:
        """Tell the trackers alone, what is a finite number; a finished run's held-out figures are in summary.json."""
        numbers = {
            name: value for name, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)
        }
        if numbers:
            self._each_tracker(lambda tracker: tracker.log(step, numbers))

    def close(self, failed: bool = False) -> None:
        """``failed``: the trackers say so of the run."""
        self._each_tracker(lambda tracker: tracker.close(failed))
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.close(failed=kind is not None)

    def _warn_non_finite(self, step: int, names: set[str]) -> None:
        for name in sorted(names - self._non_finite):
            log.warning(
                "%s is not finite at step %d: metrics.jsonl holds null there, and wherever else it is not", name, step
            )
        self._non_finite |= names

    def _each_tracker(self, action: Callable[[Tracker], None]) -> None:
        """A tracker that fails is dropped with its reason: a lost connection must not stop days of training."""
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                log.warning(
                    "%s failed and gets no more metrics (metrics.jsonl still has them all): %r", tracker.name, error
                )


class RolloutsWriter:
    """A few responses of every step in RUN/rollouts.jsonl, one row each: what the model says. One rank holds it."""

    def __init__(self, run_dir: Path, count: int, resume_step: int = 0) -> None:
        self._lines = JsonLines(run_dir / "rollouts.jsonl", resume_step)
        self._count = count

    def write(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Log ``count`` responses (fewer if there are not as many), the same ones whenever the step is the same."""
        for place, sample in spread([len(group.rollouts) for group in groups], self._count):
            self._lines.write(rollout_row(step, groups[place].prompt, groups[place].rollouts[sample]))

    def close(self) -> None:
        self._lines.close()


def spread(sizes: Sequence[int], count: int) -> list[tuple[int, int]]:
    """(group, sample) of ``count`` responses, over as many groups as possible: evenly spaced where groups are plenty.

    spread([4] * 8, 3) == [(0, 0), (2, 0), (5, 0)];  spread([2, 2], 3) == [(0, 0), (1, 0), (0, 1)]
    """
    chosen: list[tuple[int, int]] = []
    for sample in range(max(sizes, default=0)):
        places = [place for place, size in enumerate(sizes) if sample < size]
        take = min(count - len(chosen), len(places))
        chosen += [(places[index * len(places) // take], sample) for index in range(take)]
    return chosen


def rollout_row(step: int, prompt: Prompt, rollout: Rollout) -> dict[str, Any]:
    """One response as plain values; what its verdict says is null before it is scored."""
    verdict = rollout.verdict
    return {
        "step": step,
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "sample": rollout.sample_index,
        "response": rollout.text,
        "tokens": len(rollout.response_ids),
        "reward": verdict.reward if verdict else None,
        "right": is_right(verdict) if verdict else None,
        "status": verdict.status if verdict else None,
        "extracted": verdict.extracted if verdict else None,
        "answer": prompt.answer,
        "finish_reason": rollout.finish_reason,
        "policy_version": rollout.policy_version,
        "log_prob": sum(rollout.rollout_log_probs),
    }


def row_is_right(row: Mapping[str, Any]) -> bool | None:
    """Whether the response of a ``rollout_row`` is right; earlier versions wrote rows without ``right``."""
    if row.get("reward") is None or row.get("status") is None:
        return None
    return is_right(Verdict(row["reward"], row["status"], right=row.get("right")))
