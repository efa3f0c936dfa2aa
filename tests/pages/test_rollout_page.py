"""The page of a step's tokens: the record as it is, and what a model writes as text."""

from __future__ import annotations

import base64
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_rlvr.pages import page, report_parts
from megatron_rlvr.pages.rollout_page import build_rollout_page
from megatron_rlvr.token_records import TokenWriter, read_record
from megatron_rlvr.verdict import Verdict
from tests.browser.pages import ATTACKS, attacking_record

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    recording, texts = attacking_record()
    TokenWriter(folder, lambda ids: texts[ids[0]]).write(3, recording)
    return folder


@pytest.fixture(scope="module")
def html(run) -> str:
    return build_rollout_page(run, 3).read_text(encoding="utf-8")


def data(html: str) -> dict:
    return json.loads(re.findall(r'<script type="application/json" id="record">(.*?)</script>', html, re.DOTALL)[0])


def test_the_page_holds_the_numbers_of_the_record(run, html):
    record, packed = read_record(run, 3), data(html)
    columns = {column["name"]: column for column in packed["columns"]}
    assert columns.keys() == record.columns.keys()
    for name, column in columns.items():
        values = np.frombuffer(base64.b64decode(column["values"]), np.uint8 if column["flag"] else np.float32)
        assert np.array_equal(values, record.columns[name].numpy()), name
    places = np.frombuffer(base64.b64decode(packed["tokens"]), np.float32).astype(int)
    texts = [packed["texts"][place] for place in places]
    assert len(texts) == len(record.texts) and texts[: len(ATTACKS)] == ATTACKS
    assert [row["stop"] - row["start"] for row in packed["responses"]] == [10, 100_000]


def test_what_a_model_writes_ends_no_tag(html):
    assert html.count("<script") == 2 and html.count("</script>") == 2
    assert "attacked=1</script>" not in html and "onerror=window" not in html.replace("\\u003cimg src=x onerror", "")
    shown = json.dumps(data(html), ensure_ascii=False)
    assert "␀␛" in shown and "‹U+202E›abc‹U+200F›" in shown
    assert not set("\x00\x1b\u202e\u200f") & set(html)
    assert page.text("""' onclick="x\"""") == "&#x27; onclick=&quot;x&quot;"  # nor an attribute
    assert all("&lt;b&gt;</td>" in report_parts.table(["name"], [[cell]]) for cell in ("<b>", ("<b>", 1)))


def test_text_that_is_no_utf8_costs_no_page(tmp_path):
    written = page.write(tmp_path / "page.html", page.document("a", page.pre("half a pair: \ud800"), ""))
    assert "half a pair: \\ud800" in written.read_text(encoding="utf-8") and len(list(tmp_path.iterdir())) == 1


def test_right_is_what_the_verdict_says_whatever_the_reward(tmp_path):
    recording, texts = attacking_record()
    first, second = recording.chosen
    first.rollout.verdict = Verdict(1.0, "ok", right=False)
    second.rollout.verdict = Verdict(1.0, "timeout")
    TokenWriter(tmp_path, lambda ids: texts[ids[0]]).write(1, recording)
    assert [row["right"] for row in data(build_rollout_page(tmp_path, 1).read_text())["responses"]] == [False, None]


def test_tokens_that_nothing_was_computed_of_have_no_numbers(tmp_path):
    recording, texts = attacking_record()
    recording.chosen[0].rollout.verdict = Verdict(0.0, "error")
    TokenWriter(tmp_path, lambda ids: texts[ids[0]]).write(1, recording)
    columns = data(build_rollout_page(tmp_path, 1).read_text())["columns"]
    stop = recording.chosen[0].stop
    assert {column["flag"] for column in columns} == {True, False}
    for column in columns:
        values = np.frombuffer(base64.b64decode(column["values"]), np.uint8 if column["flag"] else np.float32)
        known = recording.columns[column["name"]].numpy()[stop:]
        assert np.array_equal(values[stop:], known)
        assert (values[:stop] == 2).all() if column["flag"] else np.isnan(values[:stop]).all()


def test_a_gap_between_policy_and_engine_is_shown_where_both_are_known(tmp_path):
    recording, texts = attacking_record()
    recording.columns["rollout_log_prob"] = recording.columns["log_prob"] + 0.5
    TokenWriter(tmp_path, lambda ids: texts[ids[0]]).write(1, recording)
    columns = {column["name"]: column for column in data(build_rollout_page(tmp_path, 1).read_text())["columns"]}
    gaps = np.frombuffer(base64.b64decode(columns["log_prob_gap"]["values"]), np.float32)
    assert np.allclose(gaps, 0.5)


def test_the_tool_makes_a_page_or_says_why_not(run, monkeypatch, capsys):
    def call(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["show_rollouts.py", str(run), *more])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools/show_rollouts.py"), run_name="__main__")
        return ended.value.code

    assert call() == 0
    assert capsys.readouterr().out.strip() == str(run / "tokens" / "step_3.html")
    assert call("--step", "4") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "it holds 1 steps from 3 to 3" in line
