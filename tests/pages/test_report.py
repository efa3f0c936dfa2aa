"""The report: one file, offline, escaped, drawn from whatever the run has logged."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_rlvr.config import Config, dump
from megatron_rlvr.pages import charts, report
from megatron_rlvr.pages.charts import Chart, draw, read_lines, running_mean, thin
from megatron_rlvr.pages.comparison import build_comparison
from megatron_rlvr.pages.key_figures import key_figures
from megatron_rlvr.pages.report import build_report, run_rows
from megatron_rlvr.pages.report_charts import CHARTS, PHASES
from megatron_rlvr.pages.words import some_records
from megatron_rlvr.token_records import TokenWriter
from tests.test_recorder import one_rank

ROOT = Path(__file__).parents[2]
ATTACK = "</pre><script>alert(1)</script>&amp; <img src=x onerror=y> \x00\x1b 数学"


def step_row(step: int, **more) -> dict:
    row = {"step": step, "reward/mean": 0.1 + step / 100, "reward/std": 0.3, "policy/entropy": 0.9 - step / 100}
    row |= {"policy/grad_norm": 0.5, "policy/clip_share": 0.01, "tokens/response_mean": 5.5, "tokens/per_second": 900.0}
    row |= {"lp_reg/share": 0.004, "rollout/log_prob_gap_max": 2e-6, "rollout/log_prob_gap_mean": 3e-7}
    row |= {"eval/head_std": 0.2 / step, "critic/explained_variance": 0.1 * step, "critic/head_std": 0.1 / step}
    row |= {"rollout/truncated_share": 0.0, "sync/verified": True, "time/step": 1.0, "time/generate": 0.4}
    row |= {"lp_reg/survive_share": 0.3, "lp_reg/kept_mass": 0.97, "lp_reg/delta": 0.02, "policy/ratio_max": 1.5}
    row |= {"cde/bonus": 0.1, "cde/critic_bonus": 0.01, "cde/omega": 1.0, "policy/kl": 1e-3, "policy/ref_kl": 0.02}
    row |= {"rollout/perplexity_right": 1.5, "rollout/perplexity_wrong": 3.0, "rollout/calibration_gap": 1.5}
    row |= {"reward/always_right_share": 0.1, "reward/never_right_share": 0.6}
    row |= {"memory/rank_most_gib": 3.0, "memory/rank_least_gib": 2.5}
    row |= {"time/verify": 0.05, "time/log_probs": 0.1, "time/train": 0.3, "time/sync": 0.02}
    return row | more


def write_run(folder: Path, rows: list[dict], rollouts: list[dict] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if rollouts is not None:
        (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollouts))
    return folder


def response(step: int, reward: float | None, text: str) -> dict:
    row = {"step": step, "prompt_id": "train/1", "prompt": "3,5,7=38>", "sample": 0, "response": text, "tokens": 6}
    return row | {
        "reward": reward,
        "status": "ok",
        "extracted": None,
        "answer": {"target": 38},
        "finish_reason": "stop",
    }


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that closes what is not open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.html, self.text, self.open = html, "", []
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "br", "img", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def full_run(tmp_path_factory) -> Path:
    rows = [step_row(step) for step in range(1, 61)]
    for step, share in ((1, 0.15), (31, 0.3)):
        rows[step - 1] |= {"eval/pass@1": share, "eval/pass@16": 0.7, "eval/distinct": 12.0}
    rollouts = [response(step, float(step % 2), f"{ATTACK} {step}") for step in range(40, 61)]
    folder = write_run(tmp_path_factory.mktemp("runs") / "full", rows, rollouts)
    config = Config(name="count<down>", verifier="countdown", exploration={"lp_reg": {"rho": 0.05}})
    dump(config, folder / "config.yaml")
    (folder / "summary.json").write_text(json.dumps({"steps": 60, "eval/pass@1": 0.4}))
    build_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(full_run) -> Page:
    return Page((full_run / "report.html").read_text(encoding="utf-8"))


def test_what_a_method_measures_has_a_chart(tmp_path):
    rows = [
        step_row(step, **{"rare/left_out": 0.1 * step, "other/x": 1.0, "lp_reg/candidates": 0.2}) for step in (1, 2)
    ]
    folder = write_run(tmp_path / "run", [row | {"rollout/kept_share": 1.0} for row in rows])
    dump(Config(verifier="math", exploration={"rare": {}, "lp_reg": {}}), folder / "config.yaml")
    text = Page(build_report(folder).read_text()).text
    assert "rare: left out" in text and "lp reg: candidates" in text
    assert "other: x" not in text and "lp reg: share" not in text and "Kept groups" not in text
    write_run(folder, [row | {"rollout/kept_share": 0.5, "rollout/generations": 2.0} for row in rows])
    text = Page(build_report(folder).read_text()).text
    assert "Kept groups" in text and "Generations" in text
    other = write_run(tmp_path / "other", [step_row(step) for step in (1, 2)])
    text = Page(build_comparison([folder, other], tmp_path / "comparison.html").read_text()).text
    assert "rare: left out" in text and "other: x" not in text and "Kept groups" in text


def test_every_chart_is_there(page):
    absent = ("Words that explore", "Held-out sources")  # nothing is recorded token by token, and one set held out
    here = [chart for chart in CHARTS if chart.title not in absent]
    assert page.tags.count("figure") == page.tags.count("svg") == len(here) == len(CHARTS) - 2
    assert all(chart.title in page.text for chart in here)
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert "Reward, the verifier's, mean over the step's responses: mean from 0.11 to 0.7" in labels
    assert "Held-out prompts, share solved: pass@1 from 0.15 to 0.4; pass@16 from 0.7 to 0.7" in labels


def test_the_page_needs_nothing_else(page, full_run):
    assert not {"img", "iframe", "object", "image", "foreignobject"} & set(page.tags)
    html = (full_run / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"' )<]*", html) == []
    links = [value for _, name, value in page.attributes if name in ("href", "xlink:href", "src")]
    assert all(link.startswith("#") or link == "data:," for link in links)  # the icon, which a browser would ask for
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    policy = [value for tag, name, value in page.attributes if tag == "meta" and value.startswith("default-src")]
    runs = [html[start.end() : html.index("</script>", start.end())] for start in re.finditer("<script>", html)]
    assert len(runs) == 1  # ours; the other blocks are data, which no browser runs
    digest = base64.b64encode(hashlib.sha256(runs[0].encode()).digest()).decode()
    assert policy == [f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"]


def test_ids_are_unique_and_every_reference_has_one(page, full_run):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    html = (full_run / "report.html").read_text(encoding="utf-8")
    used = set(re.findall(r"url\(#([^)]*)\)", html)) | set(re.findall(r'href="#([^"]*)"', html))
    used |= {value for _, name, value in page.attributes if name == "data-chart"}
    assert used
    assert used <= set(ids)


def test_light_and_dark_define_the_same_colours(full_run):
    html = (full_run / "report.html").read_text(encoding="utf-8")
    light, dark = (set(re.findall(r"(--\w+):", block)) for block in re.findall(r":root \{(.*?)\}", html, re.DOTALL))
    used = set(re.findall(r"var\((--\w+)\)", html))
    assert light == dark
    assert used <= light
    assert "#f0000" not in html  # no placeholder colour is left
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_text_from_the_run_is_escaped(page, full_run):
    assert "</pre><script>alert(1)</script>&amp; <img src=x onerror=y> ␀␛ 数学 60" in page.text
    assert "count<down>" in page.text
    assert "rho: 0.05" in page.text
    assert "\x00" not in (full_run / "report.html").read_text(encoding="utf-8")


def test_examples_are_the_newest_right_and_wrong_ones(page):
    shown = [int(step) for step in re.findall(r"数学 (\d+)", page.text)]
    assert shown == [59, 57, 55, 53, 60, 58, 56, 54]
    assert "reward 1 " in page.text


def test_key_figures_are_the_numbers_of_the_run(page):
    figures = {name: (value, note) for name, value, note in key_figures([step_row(step) for step in range(1, 61)])}
    assert figures["Reward"] == ("0.205 → 0.605", "first and last 20 steps, × 2.95")
    assert figures["Log-prob gap"][0] == "2.0e-06"
    assert figures["Weight sync"][0] == "60 of 60"
    assert figures["Time in steps"] == ("1 min 00 s", "1.00 s per step, 900 tokens/s")
    assert "15.0% → 40.0%" in page.text  # held out: the last is the finished run's, from summary.json
    assert "60 of 100 steps" in page.text
    failed = {name: value for name, value, _ in key_figures([step_row(1), step_row(2, **{"sync/verified": False})])}
    assert failed["Weight sync"] == "1 of 2"


def test_building_again_gives_the_same_bytes(full_run):
    first = (full_run / "report.html").read_bytes()
    build_report(full_run)
    assert (full_run / "report.html").read_bytes() == first
    assert not list(full_run.glob("*.new"))


@pytest.mark.parametrize(
    "rows",
    [
        [step_row(1)],
        [{"step": 1}, {"step": 2}],
        [step_row(step, **{"reward/mean": None, "policy/grad_norm": 0.0, "lp_reg/share": 0.0}) for step in (1, 2, 3)],
        [step_row(step, **{"rollout/log_prob_gap_max": 0.0, "rollout/log_prob_gap_mean": 0.0}) for step in (1, 2)],
        [step_row(step, **{"reward/mean": -step}) for step in (1, 2, 3)],
        [
            {"step": 1, "eval/pass@1": 0.5, "eval/pass@8": 0.9},
            {"step": 2, "time/generate": 1.0},
            {"step": 3, "time/generate": 2.0},
        ],
    ],
    ids=["one step", "no metric", "null and zero", "no gap", "negative", "partial"],
)
def test_what_is_missing_is_left_out(tmp_path, rows):
    html = build_report(write_run(tmp_path / "run", rows)).read_text()
    Page(html)
    assert not re.search(r"\b(nan|inf|None)\b", html)
    has_reward_line = sum(row.get("reward/mean") is not None for row in rows) > 1
    assert ('aria-label="Reward' in html) == has_reward_line


def test_a_run_that_is_being_written_can_be_reported(tmp_path):
    folder = write_run(tmp_path / "run", [step_row(1), step_row(2)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    assert "steps: 2" in build_report(folder).read_text()


def test_long_responses_are_cut_and_say_so(tmp_path):
    folder = write_run(tmp_path / "run", [step_row(1)], [response(1, 0.0, "x" * 5000), response(1, None, "unjudged")])
    html = build_report(folder).read_text()
    assert "x" * 4000 + " … 1,000 more characters" in html
    assert "unjudged" not in html


def test_responses_are_shown_as_they_were_judged_whatever_the_reward(tmp_path):
    rollouts = [response(1, 1.0, "formatted") | {"right": False}, response(1, 0.5, "unformatted") | {"right": True}]
    rollouts += [response(1, 1.0, "earlier"), response(1, 0.0, "timed out") | {"status": "timeout", "right": None}]
    html = build_report(write_run(tmp_path / "run", [step_row(1)], rollouts)).read_text()
    right, wrong = html.partition('class="right"')[2].split('class="wrong"')
    assert "unformatted" in right and "earlier" in right
    assert ">formatted<" in wrong and "earlier" not in wrong and "timed out" not in right + wrong


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent/metrics\.jsonl"):
        build_report(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no step"):
        build_report(write_run(tmp_path / "empty", []))
    (tmp_path / "empty" / "metrics.jsonl").write_text("{oops\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        build_report(tmp_path / "empty")
    for name, text in (
        ("summary.json", '{"steps": 1, "eval/pa'),
        ("config.yaml", "name: [run"),
        ("config.yaml", "[]\n1"),
    ):
        folder = write_run(tmp_path / "damaged", [step_row(1)])
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{folder}/{name} is no "):
            build_report(folder)
        (folder / name).unlink()
    (folder / "config.yaml").write_text("trainer:\nrollout: [8, 16]\nverifier: kk\n")  # by hand: a page all the same
    assert "kk verifier" in Page(build_report(folder).read_text()).text


def test_the_tool_builds_what_it_can_and_fails_for_the_rest(tmp_path, monkeypatch, capsys):
    folders = [write_run(tmp_path / name, [step_row(1), step_row(2)]) for name in ("one", "two")]

    def call(*runs: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, runs)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / "report.py"), run_name="__main__")
        return ended.value.code

    assert call(tmp_path / "absent", folders[0]) == 1
    shown = capsys.readouterr()
    assert shown.out.split() == [str(folders[0] / "report.html")]
    assert shown.err.startswith("error: ") and len(shown.err.splitlines()) == 1
    assert call(*folders) == 0
    pages = [str(folder / "report.html") for folder in folders]
    assert capsys.readouterr().out.split() == [*pages, str(tmp_path / "comparison.html")]


def test_warnings_say_where_they_began_and_why(tmp_path):
    rows = [step_row(step, **{"policy/entropy": 0.9 if step < 30 else 0.01}) for step in range(1, 81)]
    page = Page(build_report(write_run(tmp_path / "run", rows)).read_text())
    assert "Entropy collapse" in page.text and "Samples of a prompt become alike" in page.text
    (began,) = [int(value) for tag, name, value in page.attributes if (tag, name) == ("td", "data-value")]
    assert 30 <= began <= 50
    assert "No warning" in Page(build_report(write_run(tmp_path / "well", [step_row(1)])).read_text()).text


def test_the_report_links_to_the_tokens(tmp_path):
    folder = write_run(tmp_path / "run", [step_row(1), step_row(2)])
    recording, _ = one_rank(2)
    for step in (1, 2):
        TokenWriter(folder, str, step - 1).write(step, recording)
    page = Page(build_report(folder).read_text())
    assert ("a", "href", "tokens/step_2.html") in page.attributes
    assert (folder / "tokens/step_2.html").exists() and not (folder / "tokens/step_1.html").exists()
    TokenWriter(folder, str, 1)  # a run that goes on from step 1 takes back what came later
    assert not (folder / "tokens/step_2.html").exists()


def test_a_damaged_record_of_tokens_costs_its_own_points_alone(tmp_path):
    folder = write_run(tmp_path / "run", [step_row(1), step_row(2), step_row(3)])
    recording, _ = one_rank(2)
    for step in (1, 2, 3):
        TokenWriter(folder, str, step - 1).write(step, recording)
    (folder / "tokens/step_2.safetensors").write_bytes(b"")
    assert [record.step for record in some_records(folder)] == [1, 3]
    build_report(folder)
    assert (folder / "tokens/step_3.html").exists()
    (folder / "tokens/step_3.safetensors").write_bytes(b"")  # the newest
    build_report(folder)
    assert (folder / "tokens/step_1.html").exists()
    (folder / "tokens/step_4.new").write_bytes(b"half")
    TokenWriter(folder, str, 3)
    assert not (folder / "tokens/step_4.new").exists()


def test_held_out_figures_of_a_run_that_was_given_more_steps_are_not_its_last(tmp_path):
    folder = write_run(tmp_path / "run", [step_row(1), step_row(2)])
    (folder / "summary.json").write_text(json.dumps({"steps": 2, "eval/pass@1": 0.4}))
    assert run_rows(folder)[-1] == {"step": 3, "eval/pass@1": 0.4}
    write_run(folder, [step_row(1), step_row(2), step_row(3)])
    assert run_rows(folder)[-1]["step"] == 3 and "eval/pass@1" not in run_rows(folder)[-1]


def test_running_mean_is_centred():
    values = np.array([0.0, 3.0, 6.0, 9.0, 30.0])
    assert running_mean(values, 1).tolist() == [1.5, 3.0, 6.0, 15.0, 19.5]
    assert running_mean(values, 0).tolist() == values.tolist()
    line = np.arange(50.0)
    np.testing.assert_allclose(running_mean(line, 10)[10:40], line[10:40])


def test_long_runs_are_thinned_and_peaks_survive():
    values = np.zeros(4000)
    values[1234] = 8.0
    assert len(thin(values)) == 400
    assert thin(values, np.max).max() == 8.0
    assert thin(values).sum() == pytest.approx(0.8)
    assert thin(values[:7]).tolist() == [0.0] * 7
    rows = [step_row(step) for step in range(1, 4001)]
    drawing = draw(CHARTS[0], rows)
    assert drawing is not None
    assert len(drawing.svg) < 60_000
    rows = [{"step": step, "policy/ratio_max": 50.0 if step == 1234 else 1.0} for step in range(1, 4001)]
    drawing = draw(Chart("Largest ratio", "", "trend", {"policy/ratio_max": ""}), rows)
    assert drawing is not None and max(drawing.data["lines"][0]["values"]) == 50.0


def test_what_is_read_out_says_the_steps_that_it_stands_for():
    """The script shows a value beside a step as that step's own only within its span."""

    def lines_of(count: int, every: int) -> list[dict]:
        drawing = draw(CHARTS[0], [step_row(step) for step in range(1, count * every + 1, every)])
        assert drawing is not None
        return drawing.data["lines"]

    (each,), (sparse,), (thinned,) = lines_of(400, 1), lines_of(8, 50), lines_of(800, 3)
    assert (each["span"], each["steps"][-1]) == (1, 400) and (sparse["span"], sparse["steps"][1]) == (1, 51)
    assert thinned["span"] == pytest.approx(2400 / 400, rel=0.01) and thinned["steps"][:2] == [2.5, 8.5]


def test_titles_that_differ_in_a_sign_have_charts_of_their_own(tmp_path):
    names = ("a b", "a-b", "A.B", "数", "学")
    rows = [step_row(step, **{f"eval/{name}/pass@1": 0.2 for name in names}) for step in (1, 2)]
    folders = [write_run(tmp_path / name, rows) for name in ("one", "two")]
    page = Page(build_comparison(folders, tmp_path / "comparison.html").read_text())
    charts = [value for _, name, value in page.attributes if name == "data-chart"]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(set(charts)) == len(charts) and len(set(ids)) == len(ids)
    assert all(f"Held-out sources: {name}" in page.text for name in names)


def test_a_report_reads_the_end_of_what_was_said(tmp_path, monkeypatch):
    said = [response(step, float(step % 2), f"said at {step}.") for step in range(1, 41)]
    folder = write_run(tmp_path / "run", [step_row(1)], said)
    monkeypatch.setattr(report, "NEWEST", 10 * len(json.dumps(said[-1])) + 15)
    text = Page(build_report(folder).read_text()).text
    assert [int(step) for step in re.findall(r"said at (\d+)\.", text)] == [39, 37, 35, 33, 40, 38, 36, 34]
    monkeypatch.setattr(report, "NEWEST", 4 * len(json.dumps(said[-1])) + 8)
    text = Page(build_report(folder).read_text()).text
    assert [int(step) for step in re.findall(r"said at (\d+)\.", text)] == [39, 37, 40, 38]


def test_more_lines_than_colours_and_phases_that_come_later():
    sources = Chart("S", "", "points", {"critic/head_std": "training", "eval/*/head_std": "*"})
    rows = [{"step": step} | {f"eval/{name}/head_std": 0.1 for name in "abcdefghijklm"} for step in (1, 2)]
    lines = read_lines(sources, rows)
    assert [line.label for line in lines] == list("abcdefghijklm")
    assert len({line.colour for line in lines[:10]}) == 10
    phases = Chart("T", "", "stack", {"time/a": "a", "time/b": "b"}, whole="time/step")
    later = {"time/b": 6.0}
    rows = [{"step": step, "time/step": 10.0, "time/a": 4.0} | (later if step > 5 else {}) for step in range(1, 11)]
    axes = Figure().add_subplot()
    charts._stack(axes, read_lines(phases, rows), phases, rows)
    heights = [[y for x, y in axes.collections[1].get_paths()[0].vertices if x == step] for step in (1, 10)]
    assert [max(of) - min(of) for of in heights] == [0.0, 6.0]  # at first there was no such phase


def test_rare_peaks_leave_the_picture_of_a_chart_that_says_so():
    rows = [{"step": step, "low": 1.0, "high": 166.0 if step == 87 else 2.0} for step in range(1, 201)]
    tops = []
    for cut in (False, True):
        axes = Figure().subplots()
        chart = Chart("T", "", "smooth", {"low": "low", "high": "high"}, cut=cut)
        charts._trend(axes, read_lines(chart, rows), chart, rows)
        tops.append(axes.get_ylim()[1])
    assert tops[0] > 166 and tops[1] == pytest.approx(1.2 * 2)
    bold = [line.get_ydata() for line in axes.get_lines()[1::2]]
    assert [set(values) for values in bold] == [{1.0}, {2.0}]
    assert [chart.title for chart in CHARTS if chart.cut] == ["Calibration"]


def test_lines_keep_their_colour_whatever_is_missing():
    chart = Chart("T", "", "stack", {"time/a": "a", "time/b": "b"}, whole="time/step")
    rows = [{"step": step, "time/a": 1.0, "time/b": 2.0, "time/step": 4.0} for step in (1, 2)]
    without = [{"step": step, "time/b": 2.0, "time/step": 4.0} for step in (1, 2)]
    both, one = draw(chart, rows), draw(chart, without)
    assert both is not None
    assert one is not None
    assert both.legend == [("a", "--c1"), ("b", "--c2"), ("other", "--rest")]
    assert one.legend == [("b", "--c2"), ("other", "--rest")]
    (times,) = [chart for chart in CHARTS if chart.whole]
    full = draw(times, [{"step": step, "time/step": 20.0} | dict.fromkeys(PHASES, 1.0) for step in (1, 2)])
    assert full is not None
    assert len({colour for _, colour in full.legend}) == len(full.legend) == len(PHASES) + 1
    passes = Chart("P", "", "points", {"eval/pass@*": ""})
    rows = [{"step": step, "eval/pass@16": 0.5, "eval/pass@4": 0.3, "eval/pass@1": 0.1} for step in (1, 2)]
    assert [line.label for line in read_lines(passes, rows)] == ["pass@1", "pass@4", "pass@16"]
    sources = Chart("S", "", "points", {"eval/*/pass@1": "*"})
    rows = [
        {"step": step, "eval/pass@1": 0.1, "eval/aime24/pass@1": 0.5, "eval/hub:a/b/pass@1": 0.2} for step in (1, 2)
    ]
    assert [line.label for line in read_lines(sources, rows)] == ["aime24", "hub:a/b"]
