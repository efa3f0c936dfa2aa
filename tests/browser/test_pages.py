"""Real runs in a real browser: every plot drawn, what can be pressed works, nothing asked of the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlvr.pages.comparison import build_comparison
from megatron_rlvr.pages.report import build_report, run_rows
from megatron_rlvr.pages.report_charts import CHARTS
from megatron_rlvr.pages.rollout_page import build_rollout_page
from megatron_rlvr.run_warnings import warnings
from megatron_rlvr.token_records import TokenWriter, read_record
from megatron_rlvr.verdict import Verdict
from tests.browser.conftest import Browser
from tests.browser.pages import ATTACKS, LAST, attacking_record, long_run, real_runs
from tests.pages.test_report import step_row, write_run

pytestmark = pytest.mark.browser
LARGEST = 5_000_000  # bytes of a page


@pytest.fixture(scope="session")
def runs(tmp_path_factory, countdown) -> list[Path]:
    return real_runs(tmp_path_factory.mktemp("runs"))


def drawn(browser: Browser) -> int:
    """Charts on the page; each has a size and something drawn in it."""
    sizes = browser.run(
        "return [...document.querySelectorAll('figure svg')].map(svg => [svg.getBoundingClientRect().width,"
        " svg.getBoundingClientRect().height, svg.querySelectorAll('path, use').length])"
    )
    assert all(width > 150 and height > 80 and parts > 3 for width, height, parts in sizes), sizes
    assert len(sizes) == len(browser.find("figure"))
    return len(sizes)


def fits(browser: Browser) -> bool:
    return browser.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_the_report_of_a_run(browser, runs):
    for folder in runs:
        assert warnings(run_rows(folder)) == []
        path = build_report(folder)
        browser.open(path)
        assert drawn(browser) >= 15
        assert path.stat().st_size < LARGEST
    plot = browser.find("figure .plot")[0]
    plot.send_keys("")  # focus, as the tab key gives it
    output = browser.find("figure output")[0]
    assert output.text.startswith(f"step {LAST}: ")
    plot.send_keys("\ue012")  # left arrow
    assert output.text.startswith(f"step {LAST - 1}: ")
    (search,) = browser.find(".filter input")
    everything = len(browser.shown(".examples article"))
    search.send_keys("reward 1 ")
    right = browser.shown(".examples article")
    assert 0 < len(right) < everything and all("reward 1 " in item.text for item in right)
    assert browser.find(".filter output")[0].text == f"{len(right)} of {everything}"
    browser.find("a[href^='tokens/']")[-1].click()
    assert browser.driver.title.endswith(f"step {LAST} · tokens")


def test_the_comparison_of_three_runs(browser, runs, tmp_path):
    path = build_comparison(runs, tmp_path / "comparison.html")
    browser.open(path)
    assert drawn(browser) >= 20
    assert path.stat().st_size < LARGEST
    for head in range(len(browser.find("table.sorts")[0].find_elements("css selector", "th"))):
        for direction in (1, -1):
            browser.find("table.sorts")[0].find_elements("css selector", "th button")[head].click()
            cells = browser.run(
                "return [...document.querySelector('table.sorts').tBodies[0].rows].map(row => "
                "row.cells[arguments[0]].dataset.value ?? row.cells[arguments[0]].textContent)",
                head,
            )
            numbers = [cell if head == 0 else float(cell or "nan") for cell in cells]
            held = [number for number in numbers if number == number]
            assert held == sorted(held, reverse=direction == -1)
    settings = len(browser.shown("tr.setting"))
    browser.find(".filter input")[0].send_keys("exploration.lp_reg")
    assert 0 < len(browser.shown("tr.setting")) < settings


def test_the_tokens_of_a_step(browser, runs):
    folder = runs[0]
    browser.open(build_rollout_page(folder, LAST))
    record = read_record(folder, LAST)
    spans = browser.find(".tokens span")
    assert len(spans) == len(record.texts) and [span.text for span in spans] == record.texts
    browser.find(".tokens")[0].send_keys("\ue014")  # right arrow: the second token
    facts = browser.run(
        "return Object.fromEntries([...document.querySelectorAll('#token dl > div')].map(fact => "
        "[fact.querySelector('dt').textContent, fact.querySelector('dd').textContent]))"
    )
    for label, name in {"log-prob": "log_prob", "entropy": "entropy", "ratio": "ratio"}.items():
        assert float(facts[label]) == pytest.approx(float(record.columns[name][1]), rel=1e-4)
    assert facts["kept"] in ("yes", "no") and "selected by Lp-Reg" in facts
    choose(browser, "verdict", "wrong")
    wrong = sum(row["right"] is False for row in record.responses)
    assert len(browser.shown("article")) == wrong
    choose(browser, "verdict", "")
    choose(browser, "below", "0.1")
    improbable = int((record.columns["log_prob"].exp() <= 0.1).sum())
    assert browser.run("return document.querySelectorAll('.tokens span:not(.dim)').length") == improbable
    choose(browser, "below", "")
    choose(browser, "order", "least")
    least = [min(record.columns["log_prob"][row["start"] : row["stop"]]) for row in record.responses]
    first = browser.find("article p")[0].text
    assert f"prompt {record.responses[least.index(min(least))]['prompt_id']}," in first
    browser.find("#scatter summary")[0].click()
    circles = browser.find("#scatter circle")
    assert len(circles) == len(spans)
    token = int(circles[3].get_attribute("data-token"))
    browser.run("arguments[0].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))", circles[3])
    assert browser.run("return document.querySelector('.tokens .now').dataset.token") == str(token)
    colours = []
    for name in ("log_prob", "entropy", "lp_reg/selected"):
        choose(browser, "colour", name)
        colours.append(
            browser.run("return [...document.querySelectorAll('.tokens span')].map(span => span.style.background)")
        )
    assert colours[0] != colours[1] != colours[2]


def choose(browser: Browser, field: str, value: str) -> None:
    browser.run(
        "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', {bubbles: true}))",
        field,
        value,
    )


@pytest.mark.parametrize("page", ["report", "comparison", "tokens"])
def test_dark_phone_and_print(browser, runs, tmp_path, page):
    pages = {
        "report": lambda: build_report(runs[0]),
        "comparison": lambda: build_comparison(runs, tmp_path / "comparison.html"),
        "tokens": lambda: build_rollout_page(runs[0], LAST),
    }
    path = pages[page]()
    browser.open(path)
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = browser.run(ground)
    browser.tell("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.run(ground) != light
    browser.tell("Emulation.setDeviceMetricsOverride", width=375, height=800, deviceScaleFactor=1, mobile=True)
    browser.open(path)
    assert fits(browser)
    assert len(browser.tell("Page.printToPDF", printBackground=True)["data"]) > 10_000


def test_what_a_model_writes_stays_text(browser, tmp_path):
    recording, tokens = attacking_record()
    TokenWriter(tmp_path, lambda ids: tokens[ids[0]]).write(1, recording)
    path = build_rollout_page(tmp_path, 1)
    browser.open(path)
    assert browser.run("return window.attacked") is None
    assert len(browser.find("article")) == 2 and len(browser.find("script")) == 2
    shown = browser.run("return [...document.querySelectorAll('.tokens')].map(line => line.textContent)")
    for text in ATTACKS:
        assert text in shown[0]
    assert "␀␛" in shown[0] and "‹U+202E›" in shown[0] and len(shown[1]) == 100_000
    assert fits(browser) and path.stat().st_size < LARGEST


def test_a_response_that_no_verifier_judged_has_no_numbers(browser, tmp_path):
    recording, tokens = attacking_record()
    recording.chosen[0].rollout.verdict = Verdict(0.0, "error")
    TokenWriter(tmp_path, lambda ids: tokens[ids[0]]).write(1, recording)
    browser.open(build_rollout_page(tmp_path, 1))
    lines = "return [...document.querySelectorAll('.tokens')]"
    undimmed = f"{lines}.map(line => line.querySelectorAll(':not(.dim)').length)"
    colours = f"{lines}.map(line => [...line.children].filter(token => token.style.background.includes('mix')).length)"
    browser.find(".tokens")[0].send_keys("\ue014")  # right arrow
    facts = browser.run("return [...document.querySelectorAll('#token dd')].map(fact => fact.textContent)")
    assert set(facts[1:]) == {"–"} and len(facts) == 6  # beside its text: the probability and four columns
    choose(browser, "colour", "log_prob")
    assert browser.run(colours) == [0, 100_000]
    assert browser.run(undimmed) == [10, 100_000]
    choose(browser, "below", "0.5")
    below = int((recording.columns["log_prob"][10:].exp() <= 0.5).sum())
    assert browser.run(undimmed) == [0, below]
    choose(browser, "below", "")
    choose(browser, "method", "kept=0")  # every token that was judged is kept
    assert browser.run(undimmed) == [0, 0]
    choose(browser, "method", "")
    choose(browser, "order", "least")
    assert "not judged" in browser.find("article p")[1].text
    drawn = browser.run("return [...document.querySelectorAll('#scatter circle')].map(dot => +dot.dataset.token)")
    assert min(drawn) >= 10


def test_what_is_read_out_is_of_the_step_or_says_of_which(browser, tmp_path):
    lengths = {"short": 20, "long": 30}
    folders = [
        write_run(tmp_path / name, [step_row(step) for step in range(1, count + 1)]) for name, count in lengths.items()
    ]
    browser.open(build_comparison(folders, tmp_path / "comparison.html"))
    browser.find("figure .plot")[0].send_keys("")  # focus
    output = browser.find("figure output")[0]
    assert output.text == "step 30: short 0.3 (step 20) · long 0.4"
    for _ in range(10):
        browser.find("figure .plot")[0].send_keys("\ue012")  # left arrow
    assert output.text == "step 20: short 0.3 · long 0.3"


def test_a_long_run(browser, tmp_path, record_property):
    """Five hundred steps with every metric, and a model that writes what would break a page."""
    path = build_report(long_run(tmp_path / "run"))
    browser.open(path)
    timing = browser.run("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    record_property("milliseconds to load", timing)
    print(f"500 steps: {path.stat().st_size / 1e6:.2f} MB, loaded in {timing:.0f} ms")
    assert drawn(browser) == len(CHARTS) - 1  # all but the words: nothing is recorded token by token
    assert browser.run("return window.attacked") is None
    assert path.stat().st_size < LARGEST
