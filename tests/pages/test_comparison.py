"""Several runs on one page: figures, a line per run, and what their configs differ in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_rlvr.config import Config, dump
from megatron_rlvr.environment import record_start
from megatron_rlvr.pages.comparison import build_comparison
from tests.pages.test_report import Page, step_row, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    folder, made = tmp_path_factory.mktemp("runs"), []
    for place, name in enumerate(("grpo", "lp_reg", "evil<b>")):
        rows = [step_row(step, **{"reward/mean": 0.1 * (place + 1), "eval/pass@1": 0.2}) for step in range(1, 31)]
        if place == 2:
            rows = [row | {"policy/entropy": 0.9 if row["step"] < 12 else 0.01} for row in rows]
            rows += [row | {"step": row["step"] + 15} for row in rows[15:]]
        made.append(write_run(folder / name, rows))
        config = Config(name=name, seed=place, exploration={"lp_reg": {"rho": 0.05}} if place == 1 else {})
        dump(config, made[-1] / "config.yaml")
    return made


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Page:
    target = build_comparison(runs, tmp_path_factory.mktemp("page") / "comparison.html")
    return Page(target.read_text(encoding="utf-8"))


def test_every_metric_has_a_line_per_run(page):
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    (reward,) = [label for label in labels if label.startswith("Reward, ")]
    assert "grpo from 0.1 to 0.1; lp_reg from 0.2 to 0.2; evil<b> from 0.3 to 0.3" in reward
    assert len(labels) == page.tags.count("figure") > 20
    assert sum(label.startswith("Held-out prompts: pass@1") for label in labels) == 1
    assert sum(label.startswith("Calibration: right") for label in labels) == 1


def test_every_held_out_source_has_its_chart(tmp_path):
    folders = []
    for name in ("one", "two"):
        rows = [step_row(step, **{"eval/aime24/pass@1": 0.2, "eval/aime24/head_std": 0.1}) for step in (1, 2, 3)]
        folders.append(write_run(tmp_path / name, rows))
    found = Page(build_comparison(folders, tmp_path / "comparison.html").read_text()).text
    assert "Held-out sources: aime24" in found and "Disagreement of the critic's heads: aime24" in found


def test_the_table_has_means_of_the_last_steps(page):
    text = re.sub(r"\s+", " ", page.text)
    assert "Run" in text and "evil<b>" in text
    values = [float(value) for _, name, value in page.attributes if name == "data-value" and value]
    assert 0.1 in [round(value, 6) for value in values] and 0.2 in [round(value, 6) for value in values]


def test_differences_and_warnings_are_named_by_run(page):
    assert "exploration.lp_reg.rho" in page.text and "seed" in page.text
    assert "trainer.num_steps" not in page.text  # the same in all
    assert "Entropy collapse" in page.text


def test_a_warning_says_whose_it_is_where_the_others_have_none(page):
    heads = re.findall(r"<th scope[^>]*>(.*?)</th>", page.html)
    assert heads.count("Run") == 2  # of the figures and of the warnings
    assert re.search(r"<td>evil&lt;b&gt;</td><td[^>]*>\d+</td><td>Entropy collapse", page.html)


def test_a_peak_of_a_long_run_is_drawn(tmp_path):
    folders = [
        write_run(
            tmp_path / name,
            [step_row(step, **{"policy/ratio_max": 5.0 if step == peak else 1.0}) for step in range(1, 1201)],
        )
        for name, peak in (("one", 600), ("two", 7))
    ]
    html = build_comparison(folders, tmp_path / "comparison.html").read_text()
    (ratio,) = [data for data in map(json.loads, re.findall(r'id="data-largest-ratio[^"]*">(.*?)</script>', html))]
    assert [max(line["values"]) for line in ratio["lines"]] == [5.0, 5.0]


def test_a_line_goes_from_step_to_step_whichever_the_other_run_has(tmp_path):
    folders = [
        write_run(tmp_path / name, [step_row(step, **{"eval/pass@1": step / 100}) for step in steps])
        for name, steps in (("one", (10, 20, 30)), ("two", (5, 10, 15)))
    ]
    html = build_comparison(folders, tmp_path / "comparison.html").read_text()
    charts = map(json.loads, re.findall(r'id="data-[^"]*">(.*?)</script>', html))
    lines = [line for chart in charts for line in chart["lines"]]
    assert lines and {tuple(line["steps"]) for line in lines} == {(10, 20, 30), (5, 10, 15)}


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    folders = [write_run(_made(tmp_path / above / "run"), [step_row(1), step_row(2)]) for above in ("a", "b")]
    text = build_comparison(folders, tmp_path / "c.html").read_text()
    assert str(folders[0]) in text and str(folders[1]) in text
    assert "Nothing." in text


def test_too_many_or_too_few_runs_are_refused(tmp_path):
    for count in (1, 7):
        with pytest.raises(ValueError, match=f"2 to 6 runs, not {count}"):
            build_comparison([tmp_path] * count, tmp_path / "c.html")


def _made(folder: Path) -> Path:
    folder.parent.mkdir(parents=True)
    return folder


def test_methods_are_compared_by_all_their_options_as_last_started(tmp_path):
    folders = []
    for name, rho in (("standard", 0.01), ("other", 0.05)):
        folders.append(write_run(tmp_path / name, [step_row(1)]))
        dump(
            Config(name=name, exploration={"lp_reg": {} if rho == 0.01 else {"rho": rho}}), folders[-1] / "config.yaml"
        )
        for share in (0.9, 0.002):  # a start and the one after it
            record_start(folders[-1], {"lp_reg": {"rho": rho, "target_share": share}})
    found = re.sub(r"\s+", " ", Page(build_comparison(folders, tmp_path / "comparison.html").read_text()).text)
    assert "exploration.lp_reg.rho0.010.05" in found and "target_share" not in found
