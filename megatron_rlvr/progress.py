"""Where a run stands, for the person who watches it: a live view on a terminal, plain lines in a log file."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_PICTURES = 0.2  # of one phase
WINDOW = 20  # steps: of the reward's mean, and of the pace that the time left is reckoned from
SPARKS = "▁▂▃▄▅▆▇█"


class Progress:
    """Step and phase, reward with its mean of 20 steps, entropy, tokens per second, memory, time left, last warning.

    with Progress(total=300, mode=config.logging.progress, start=120) as progress:
        progress.phase("generate", "12/64")
        progress.step({"reward/mean": 0.21, "policy/entropy": 0.6, "tokens/per_second": 1800.0}, warning="")

    ``mode`` auto takes the bar, a live view that has the rewards as a sparkline too, where standard output is a
    terminal, and lines where it is not; none prints nothing and is what every rank but the first takes. ``start``:
    steps done by an earlier run that this one resumes.
    Lines come at most every 10 seconds, for the first and the last step, and for a new warning. A metric that a step
    lacks is left out.
    """

    def __init__(
        self,
        total: int,
        mode: Literal["auto", "bar", "lines", "none"] = "auto",
        start: int = 0,
        console: Console | None = None,
    ) -> None:
        self._console = console or Console()
        self._mode = mode if mode != "auto" else "bar" if self._console.is_terminal else "lines"
        self._total, self._done = total, start
        self._rewards: deque[float] = deque(maxlen=WINDOW)
        self._ends = deque([time.monotonic()], maxlen=WINDOW + 1)  # when each step ended
        self._printed: float | None = None  # when the last line was
        self._drawn = 0.0  # when the last picture was
        self._summary, self._memory, self._warning, self._phase = "", "", "", "starting"
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._mode == "bar":
            # No refresh thread: the run forks processes, which would inherit its locks. Each call redraws instead.
            self._live = Live(self._view(), console=self._console, auto_refresh=False)
            self._live.start()
        self._ends[-1] = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def phase(self, name: str, done: str = "") -> None:
        """Say what the step is doing now, and how much of that is done; only the bar shows it."""
        if done and time.monotonic() - self._drawn < SECONDS_BETWEEN_PICTURES:
            return
        self._redraw(f"{name} {done}".rstrip())

    def step(self, metrics: Mapping[str, Any], warning: str = "") -> None:
        """One step is done, with these metrics; ``warning``: the newest of the run, empty for none."""
        self._done += 1
        is_news, self._warning = warning not in ("", self._warning), warning
        self._ends.append(time.monotonic())
        if _known(metrics.get("reward/mean")):
            self._rewards.append(float(metrics["reward/mean"]))
        self._summary = self._summarise(metrics)
        self._memory = _memory(metrics)
        self._redraw("done" if self._done == self._total else "")
        if self._mode == "lines" and is_news:
            self._console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
        if self._mode == "lines" and self._line_due():
            self._printed = self._ends[-1]
            self._console.print(
                f"step {self._done}/{self._total}  {self._summary}", markup=False, highlight=False, soft_wrap=True
            )

    def _redraw(self, phase: str) -> None:
        self._phase, self._drawn = phase, time.monotonic()
        if self._live:
            self._live.update(self._view(), refresh=True)

    def _view(self) -> Group:
        """Three lines at most: where the run is, what it reaches, what to worry about."""
        bar = Table.grid(padding=(0, 1))
        done = ProgressBar(total=self._total, completed=self._done, width=20)
        bar.add_row(f"{self._done}/{self._total}", done, Text(self._phase))
        seen = "  ".join(part for part in (self._summary, sparkline(self._rewards), self._memory) if part)
        lines: list[Table | Text] = [bar, Text(seen)]
        return Group(*lines, *([Text(f"warning: {self._warning}", style="yellow")] if self._warning else []))

    def _line_due(self) -> bool:
        last = self._done == self._total
        return last or self._printed is None or self._ends[-1] - self._printed >= SECONDS_BETWEEN_LINES

    def _summarise(self, metrics: Mapping[str, Any]) -> str:
        reward, entropy, pace = (metrics.get(name) for name in ("reward/mean", "policy/entropy", "tokens/per_second"))
        parts = []
        if _known(reward):
            parts.append(
                f"reward {reward:.3f} (last {len(self._rewards)}: {sum(self._rewards) / len(self._rewards):.3f})"
            )
        if _known(entropy):
            parts.append(f"entropy {entropy:.3f}")
        if _known(pace):
            parts.append(f"{pace:,.0f} tokens/s")
        if self._done < self._total:
            seconds = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
            parts.append(f"{duration(seconds * (self._total - self._done))} left")
        return "  ".join(parts)


def sparkline(values: Iterable[float]) -> str:
    """One character per value, from the lowest to the highest: [0, 1, 0.5] -> "▁█▅"; all alike are in the middle."""
    numbers = list(values)
    low, span = min(numbers, default=0.0), max(numbers, default=0.0) - min(numbers, default=0.0)
    shares = [(value - low) / span if span else 0.5 for value in numbers]
    return "".join(SPARKS[round(share * (len(SPARKS) - 1))] for share in shares)


def _memory(metrics: Mapping[str, Any]) -> str:
    least, most = metrics.get("memory/rank_least_gib"), metrics.get("memory/rank_most_gib")
    return f"{least:.1f} to {most:.1f} GiB per rank" if _known(least) and _known(most) else ""


def duration(seconds: float) -> str:
    """A time span in its two largest units: 42 s, 3 min 05 s, 2 h 07 min, 3 d 04 h."""
    whole = round(seconds)
    for size, unit, below, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below:02d} {name}"
    return f"{whole} s"


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
