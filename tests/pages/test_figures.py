"""The papers' figures hold the numbers of the records, and each is left out where nothing has them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import rc_context

from megatron_rlvr.pages.figures import FIGURES, RC, RunData, read_run, write_figures
from megatron_rlvr.pages.words import MOST_RECORDS, some_records, word_rows
from megatron_rlvr.token_records import TokenRecord, TokenWriter
from tests.pages.test_report import step_row, write_run
from tests.test_recorder import one_rank

ROOT = Path(__file__).parents[2]
METRICS = {"survivors": "lp_reg/survive_share", "delta": "lp_reg/delta", "entropy": "policy/entropy"}
METRICS |= {"calibration": "rollout/perplexity_right", "head_disagreement": "critic/head_std", "bonus": "cde/bonus"}
METRICS |= {"omega": "cde/omega"}


def record(step: int, texts: list[str], probabilities: list[float]) -> TokenRecord:
    values = torch.tensor(probabilities)
    row = {"start": 0, "stop": len(texts), "status": "ok"}
    return TokenRecord(step, [row], texts, {"log_prob": values.log(), "entropy": values * 2})


def run(name: str = "a", seed: int = 0) -> RunData:
    draw = np.random.default_rng(seed)
    rows = [step_row(step, **{"policy/entropy": float(draw.random())}) for step in range(1, 31)]
    words = [" Wait", "x", "but ", "cost", "BUT"]
    records = [record(step, words, [0.1 * step, 0.9, 0.2, 0.5, 0.3]) for step in (1, 2, 3)]
    return RunData(name, rows, records)


def test_words_are_found_whatever_their_case_and_blanks():
    rows = word_rows(run().records)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["words/exploratory"] for row in rows] == pytest.approx([0.2, 0.7 / 3, 0.8 / 3])
    assert [row["words/irrelevant"] for row in rows] == pytest.approx([0.5] * 3)
    assert word_rows([record(1, ["x"], [0.5])]) == [{"step": 1}]


@pytest.mark.parametrize("name", METRICS)
def test_a_curve_is_the_metric(name):
    data = run()
    figure = FIGURES[name]([data])
    assert figure is not None
    (axes,) = figure.axes
    curve = axes.lines[0]
    metric = [row[METRICS[name]] for row in data.rows]
    assert np.allclose(curve.get_ydata(), metric) and list(curve.get_xdata()) == list(range(1, 31))


def test_several_runs_have_a_line_each():
    figure = FIGURES["entropy"]([run("grpo", 0), run("lp_reg", 1)])
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["grpo", "lp_reg"]


def test_every_name_of_a_folder_is_drawn_as_it_is(tmp_path):
    names = ["_late", "a$b$c", "x_{$"]
    runs = [read_run(write_run(tmp_path / name, [step_row(1), step_row(2)])) for name in names]
    recorded = [RunData(one.name, one.rows, run().records) for one in runs]
    for name in ("entropy", "calibration", "probability_entropy"):
        figure = FIGURES[name](recorded)
        assert figure is not None
        with rc_context(RC):
            figure.savefig(tmp_path / "figure.svg")
        drawn = (tmp_path / "figure.svg").read_text()
        assert {text.partition(" · ")[0] for text in re.findall(r"<text [^>]*>([^<]*)</text>", drawn)} >= set(names)


def test_the_scatter_has_the_recorded_tokens():
    figure = FIGURES["probability_entropy"]([run()])
    assert figure is not None
    points = figure.axes[0].collections[0].get_offsets()
    assert len(points) == 15 and np.allclose(points[:, 1], 2 * points[:, 0])
    unread = record(1, ["a"], [0.5])
    unread.responses[0]["status"] = "unparseable"  # judged, as wrong
    assert FIGURES["probability_entropy"]([RunData("a", [], [unread])]) is not None
    unjudged = record(1, ["a"], [0.5])
    unjudged.responses[0]["status"] = "error"
    assert FIGURES["probability_entropy"]([RunData("a", [], [unjudged])]) is None


def test_a_scatter_that_is_full_holds_the_newest(monkeypatch):
    monkeypatch.setattr("megatron_rlvr.pages.figures.MOST_POINTS", 5)
    figure = FIGURES["probability_entropy"]([run()])
    assert figure is not None
    assert np.allclose(figure.axes[0].collections[0].get_offsets()[:, 0], [0.3, 0.9, 0.2, 0.5, 0.3])  # of step 3


def test_nothing_is_drawn_of_nothing():
    empty = RunData("a", [{"step": 1}, {"step": 2}], [])
    assert [name for name, draw in FIGURES.items() if draw([empty])] == []


def test_files_are_written_and_what_lacks_says_so(tmp_path):
    folder = write_run(tmp_path / "run", [step_row(step) for step in range(1, 9)])
    written = write_figures([folder], tmp_path / "figures")
    assert written["word_probability"] == written["probability_entropy"] == []
    assert [path.name for path in written["entropy"]] == ["entropy.svg", "entropy.png"]
    assert (tmp_path / "figures/entropy.svg").read_text().startswith("<?xml")
    assert (tmp_path / "figures/entropy.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name.partition(".")[0] for path in (tmp_path / "figures").iterdir()} == set(METRICS)


def test_the_tool_says_what_it_wrote_and_what_lacks(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run", [step_row(step) for step in range(1, 4)])

    def call(*runs: object) -> int:
        monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, runs)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools/figures.py"), run_name="__main__")
        return ended.value.code

    assert call(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{folder}/figures/entropy.svg {folder}/figures/entropy.png" in lines
    assert "word_probability: no run has what it shows" in lines and len(lines) == len(FIGURES)
    assert call(tmp_path / "absent") == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_long_run_is_read_in_part(tmp_path):
    recording, _ = one_rank(1)
    writer = TokenWriter(tmp_path, str)
    for number in range(1, MOST_RECORDS + 21):
        writer.write(number, recording)
    steps = [one.step for one in some_records(tmp_path)]
    assert len(steps) == MOST_RECORDS and steps[0] == 1 and steps[-1] == MOST_RECORDS + 20
    assert steps == sorted(set(steps))
