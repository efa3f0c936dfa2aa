"""What a person sees: lines in a file at sensible intervals, a bar on a terminal, nothing on the other ranks."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from megatron_rlvr import progress as module
from megatron_rlvr.progress import Progress, duration, sparkline

METRICS = {"reward/mean": 0.25, "policy/entropy": 0.6543, "tokens/per_second": 1834.4}


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def watch(
    clock: Clock, seconds: list[float], total: int, mode: str = "lines", start: int = 0, terminal: bool = False
) -> str:
    output = io.StringIO()
    console = Console(file=output, width=120, force_terminal=terminal)
    with Progress(total, mode, start, console) as progress:
        for number, step in enumerate(seconds):
            progress.phase("generate")
            clock.now += step
            progress.step(METRICS | {"reward/mean": float(number)})
    return output.getvalue()


def test_a_line_says_where_the_run_stands(clock):
    (line,) = watch(clock, [2.0], total=61).splitlines()
    assert line == "step 1/61  reward 0.000 (last 1: 0.000)  entropy 0.654  1,834 tokens/s  2 min 00 s left"


def test_lines_come_at_most_every_ten_seconds_and_at_both_ends(clock):
    lines = watch(clock, [1.0] * 24, total=24).splitlines()
    assert [int(line.split("/")[0].split()[1]) for line in lines] == [1, 11, 21, 24]
    assert "left" not in lines[-1]
    slow = watch(clock, [60.0] * 3, total=9).splitlines()
    assert len(slow) == 3


def test_the_reward_mean_and_the_pace_are_over_the_last_twenty_steps(clock):
    lines = watch(clock, [float(step) for step in range(1, 31)], total=40).splitlines()
    assert "reward 29.000 (last 20: 19.500)" in lines[-1]  # 10 .. 29
    assert lines[-1].endswith("3 min 25 s left")  # 10 steps at 20.5 s, the mean of 11 .. 30


def test_a_resumed_run_counts_on(clock):
    line = watch(clock, [1.0], total=300, start=120)
    assert line.startswith("step 121/300")
    assert "2 min 59 s left" in line


def test_missing_and_non_finite_metrics_are_left_out(clock):
    output = io.StringIO()
    with Progress(2, "lines", console=Console(file=output, width=120)) as progress:
        clock.now += 1
        progress.step({"reward/mean": float("nan"), "policy/entropy": None})
        clock.now += 1
        progress.step({})
    assert output.getvalue().splitlines() == ["step 1/2  1 s left", "step 2/2  "]


def test_auto_takes_the_bar_only_on_a_terminal(clock):
    plain = watch(clock, [1.0], total=3, mode="auto")
    assert plain.startswith("step 1/3")
    assert "\x1b" not in plain
    bar = watch(clock, [1.0], total=3, mode="auto", terminal=True)
    assert "1/3" in bar
    assert "generate" in bar
    assert "reward 0.000" in bar
    assert "step 1/3" not in bar


def test_a_new_warning_is_printed_once_and_stays_in_the_view(clock):
    warned = [METRICS | {"memory/rank_least_gib": 1.0, "memory/rank_most_gib": 1.26}] * 4
    for mode in ("lines", "bar"):
        output = io.StringIO()
        with Progress(9, mode, console=Console(file=output, width=120, force_terminal=mode == "bar")) as progress:
            for number, metrics in enumerate(warned):
                clock.now += 1
                progress.step(metrics | {"reward/mean": number / 3}, "from step 12: Entropy collapse" if number else "")
        text = output.getvalue()
        if mode == "lines":
            assert text.splitlines()[1] == "warning: from step 12: Entropy collapse"
            assert text.count("warning") == 1
        else:
            assert "▁▃▆█" in text and "1.0 to 1.3 GiB per rank" in text
            assert text.count("warning: from step 12: Entropy collapse") >= 3


def test_sparkline():
    assert sparkline([0.0, 1.0, 0.5]) == "▁█▅"
    assert sparkline([2.0, 2.0]) == "▅▅"
    assert sparkline([]) == ""


def test_the_bar_starts_no_thread_that_a_fork_would_inherit(clock):
    before = threading.active_count()
    with Progress(3, "bar", console=Console(file=io.StringIO(), force_terminal=True)) as progress:
        progress.phase("generate")
        assert threading.active_count() == before


def test_a_phase_shows_how_much_of_it_is_done_some_times_a_second(clock):
    output = io.StringIO()
    with Progress(3, "bar", console=Console(file=output, width=120, force_terminal=True)) as progress:
        progress.phase("generate")
        for done in range(1, 101):
            clock.now += 0.01
            progress.phase("generate", f"{done}/100")
        progress.phase("verify")  # at once
    shown = [done for done in range(1, 101) if f"generate {done}/100" in output.getvalue()]
    assert shown in ([20, 40, 60, 80, 100], [21, 42, 63, 84])  # of a clock that adds up hundredths
    assert "verify" in output.getvalue()


def test_none_prints_nothing(clock):
    assert watch(clock, [100.0] * 3, total=3, mode="none") == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (42, "42 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (273600, "3 d 04 h")],
)
def test_durations_read_like_a_person_writes_them(seconds, text):
    assert duration(seconds) == text
