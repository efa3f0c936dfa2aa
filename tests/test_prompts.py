"""Prompt data sets: formats, fields, what is dropped, and an order that can be resumed."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_rlvr.config import ConfigError, DataConfig, SourceConfig, from_dict
from megatron_rlvr.prompt_report import Drop
from megatron_rlvr.prompt_rows import plain
from megatron_rlvr.prompts import PromptSet, load_prompts
from megatron_rlvr.templates import BOXED, DAPO, R1_ZERO

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=fast)


@pytest.fixture
def chat_tokenizer(tokenizer, monkeypatch) -> PreTrainedTokenizerFast:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


class Characters:
    """A tokenizer of one token per character: cheap where a test reads whole files."""

    def __call__(self, texts: list[str], **_: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


RAW = DataConfig(template="raw", max_prompt_length=100)
ROWS = [{"problem": "1+1=?", "answer": "2"}, {"problem": "三角形?", "answer": 3.0}, {"problem": "pi", "answer": r"\pi"}]


def load(path: Path, data: DataConfig, tokenizer, verifier: str) -> PromptSet:
    return load_prompts([SourceConfig(str(path))], data, tokenizer, verifier)


def write(path: Path, rows: list) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8-sig")  # with the mark that some editors begin a file with
    else:
        lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.json", "train.parquet"])
def test_every_format_gives_the_same_prompts(tmp_path, tokenizer, name):
    rows = [row | {"answer": str(row["answer"])} for row in ROWS]  # parquet columns have one type
    loaded = load(write(tmp_path / name, rows), RAW, tokenizer, "math")
    assert [prompt.id for prompt in loaded.prompts] == ["train/1", "train/2", "train/3"]
    assert [prompt.text for prompt in loaded.prompts] == ["1+1=?", "三角形?", "pi"]
    assert [prompt.answer for prompt in loaded.prompts] == ["2", "3", r"\pi"]
    assert {prompt.verifier for prompt in loaded.prompts} == {"math"}
    assert [len(prompt.token_ids) for prompt in loaded.prompts] == [5, 10, 2]  # bytes
    assert tokenizer.decode(loaded.prompts[1].token_ids) == "三角形?"
    assert loaded.report == [f"{name}: 3 of 3 rows are prompts"] and loaded.drops == []


@pytest.mark.parametrize(
    "row, data",
    [
        ({"problem": "q", "answer": 7.0}, {}),
        ({"question": "q", "answer": "7"}, {}),
        ({"prompt": "q", "label": 7}, {}),
        ({"prompt": "q", "answer": "#### 7"}, {}),
        ({"problem": "q", "expected_answer": "007"}, {}),
        ({"question": "q", "final_answer": ["$7$"], "solution": [r"so \boxed{8}"]}, {}),
        ({"problem": "q", "solution": r"so \boxed{3}, then \boxed{7}"}, {}),
        ({"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "7"}, "answer": "no"}, {}),
        (
            {"prompt": "no", "body": {"text": "q"}, "answer": "no", "gold": "7"},
            {"prompt_field": "body.text", "answer_field": "gold"},
        ),
    ],
)
def test_fields_are_detected_and_explicit_ones_win(tmp_path, tokenizer, row, data):
    config = DataConfig(template="raw", **data)
    (prompt,) = load(write(tmp_path / "a.jsonl", [row]), config, tokenizer, "math").prompts
    assert (prompt.text, prompt.answer) == ("q", "7")


def test_countdown_rows(tmp_path, tokenizer):
    row = {"prompt": "3,5,7=38>", "answer": {"numbers": [3, 5, 7], "target": 38}}
    bad = row | {"answer": {"numbers": [3, 5, 7]}}
    for name in ("train.jsonl", "train.parquet"):
        loaded = load(write(tmp_path / name, [row, bad]), RAW, tokenizer, "countdown")
        assert [(prompt.text, prompt.answer) for prompt in loaded.prompts] == [(row["prompt"], row["answer"])]
        assert loaded.drops[0].reason == "not an answer for this verifier" and loaded.drops[0].row == 2


def test_templates(tmp_path, chat_tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    path = write(tmp_path / "a.jsonl", [{"prompt": messages, "answer": "7"}, {"prompt": "plain", "answer": "7"}])
    chat = load(path, DataConfig(), chat_tokenizer, "math").prompts
    assert [prompt.text for prompt in chat] == ["<system>Be brief.\n<user>q\n<bot>", "<user>plain\n<bot>"]
    assert chat_tokenizer.decode(chat[0].token_ids) == chat[0].text
    raw = load(path, RAW, chat_tokenizer, "math").prompts
    assert [prompt.text for prompt in raw] == ["q", "plain"]


def test_the_papers_templates_wrap_a_question_once(tmp_path, chat_tokenizer):
    wrapped = DAPO.replace("{prompt}", "1+{x}=?")
    path = write(tmp_path / "a.jsonl", [{"prompt": text, "answer": "7"} for text in ("1+{x}=?", wrapped)])
    for name, expected in (
        ("dapo", f"<user>{wrapped}\n<bot>"),
        ("boxed", "<user>" + BOXED.replace("{prompt}", "1+{x}=?") + "\n<bot>"),
        ("r1_zero", R1_ZERO.replace("{prompt}", "1+{x}=?")),
        ("raw", None),
    ):
        config = DataConfig(template=name, max_prompt_length=1000, repeats="keep")
        texts = [prompt.text for prompt in load(path, config, chat_tokenizer, "math").prompts]
        assert texts == ([expected, expected] if expected else ["1+{x}=?", wrapped])
    assert R1_ZERO.endswith("<think>") and DAPO.startswith("Solve the following math problem step by step.")


def test_prompts_are_the_same_tomorrow(tmp_path, tokenizer, monkeypatch):
    """The first lines of Llama 3.2's template, and its system message."""
    day = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today Date: {{ date_string }}\n"
    )
    monkeypatch.setattr(tokenizer, "chat_template", day + TEMPLATE)
    (prompt,) = load(write(tmp_path / "a.jsonl", ROWS[:1]), DataConfig(), tokenizer, "math").prompts
    assert prompt.text == "Today Date: 26 Jul 2024\n<user>1+1=?\n<bot>"


def test_a_question_that_asks_for_a_box_already_is_not_asked_twice(tmp_path, chat_tokenizer):
    """As verl's MATH and GSM8K end, and Qwen's sentence behind a space or on a line of its own."""
    endings = [
        " Let's think step by step and output the final answer within \\boxed{}.",
        ' Let\'s think step by step and output the final answer after "####".',
        " Please reason step by step, and put your final answer within \\boxed{}.",
        "\nPlease reason step by step, and put your final answer within \\boxed{}.",
    ]
    path = write(tmp_path / "a.jsonl", [{"prompt": f"1+1=?{ending}", "answer": "2"} for ending in endings])
    for name, template in (("boxed", BOXED), ("dapo", DAPO)):
        loaded = load(path, DataConfig(template=name, repeats="keep"), chat_tokenizer, "math")
        assert {prompt.text for prompt in loaded.prompts} == {f"<user>{template.replace('{prompt}', '1+1=?')}\n<bot>"}
    kept = load(path, DataConfig(), chat_tokenizer, "math")  # one question, used as the first row asks it
    assert [prompt.text for prompt in kept.prompts] == [f"<user>1+1=?{endings[0]}\n<bot>"]


def test_a_tokenizer_without_chat_template_names_the_way_out(tmp_path, tokenizer):
    for template in ("chat", "dapo"):
        with pytest.raises(ConfigError, match=f"data.template={template}.*data.template=raw"):
            load(write(tmp_path / "a.jsonl", ROWS), DataConfig(template=template), tokenizer, "math")


@pytest.mark.parametrize("default", ["<bos> $A", "<bos> $A <eos>", "$A"])
def test_a_base_models_text_begins_as_the_tokenizer_has_it(tmp_path, default):
    """As Llama 3's does with <|begin_of_text|>, once, and never with an end."""
    letters = Tokenizer(models.WordLevel({"<bos>": 0, "<eos>": 1, "<other>": 2, "a": 3}, unk_token="<other>"))
    letters.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    letters.post_processor = processors.TemplateProcessing(default, special_tokens=[("<bos>", 0), ("<eos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<bos>", chat_template="<bos> a")
    path = write(
        tmp_path / "a.jsonl", [{"problem": text, "answer": "1"} for text in ("a a", "<bos> a", "a <|im_end|>")]
    )
    start = [0] if "<bos>" in default else []

    def ids(template):
        return [
            list(prompt.token_ids) for prompt in load(path, DataConfig(template=template), tokenizer, "math").prompts
        ]

    assert ids("raw") == [[*start, 3, 3], [0, 3], [3, 2]]  # the last came in a chat template: it is as it is
    assert ids("r1_zero")[0][:2] == [*start, 2, 2][:2] and ids("r1_zero")[0][-1] == 2
    assert ids("chat")[:2] == [[0, 3], [0, 3]]
    tokenizer.chat_template = "a"  # one without a first token has none
    assert ids("chat")[:2] == [[3], [3]]
    longest = DataConfig(template="raw", max_prompt_length=2)
    assert [drop.row for drop in load(path, longest, tokenizer, "math").drops] == ([1] if start else [])


BAD = [
    {"problem": "fine", "answer": "1"},
    {"problem": "no answer", "answer": None},
    "{broken json",
    {"problem": "x" * 101, "answer": "1"},
    {"problem": "  ", "answer": "1"},
    {"problem": "no answer either"},
    {"problem": "empty", "answer": " "},
    '["a", "list"]',
    {"problem": 5, "answer": "1"},
    {"problem": [{"role": "system", "content": "only"}], "answer": "1"},
    {"problem": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}], "answer": "2"},
    {"answer": "1"},
    {"problem": "x" * 100, "answer": 12.0},
    {"problem": "third without", "answer": ""},
    {"problem": "fourth without", "answer": None},
    {"problem": "fine too", "answer": "2"},
]


def test_bad_rows_are_counted_named_and_dropped(tmp_path, tokenizer):
    loaded = load(write(tmp_path / "bad.jsonl", BAD), RAW, tokenizer, "math")
    assert [prompt.id for prompt in loaded.prompts] == ["bad/1", "bad/13", "bad/16"]
    assert loaded.prompts[1].answer == "12" and len(loaded.prompts[1].token_ids) == 100
    assert [drop.row for drop in loaded.drops] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15]
    assert Counter(drop.reason for drop in loaded.drops) == {
        "no answer": 4,
        "unreadable": 2,
        "longer than data.max_prompt_length=100 tokens": 1,
        "no prompt": 3,
        "not an answer for this verifier": 1,
        "neither text nor a list of chat messages": 1,
        "ends with a message that is not the user's": 1,
    }
    assert loaded.drops[2] == Drop(
        "bad.jsonl", 4, "problem", "longer than data.max_prompt_length=100 tokens", "101 tokens"
    )
    assert loaded.report[0] == "bad.jsonl: 3 of 16 rows are prompts"
    without = next(line for line in loaded.report if "(no answer)" in line)
    assert without == (
        "dropped 4 rows (no answer): bad.jsonl row 2, answer: no answer; bad.jsonl row 6, answer: no answer; "
        "bad.jsonl row 14, answer: no answer; ..."
    )


def test_a_row_that_the_chat_template_refuses_is_dropped_with_its_reason(tmp_path, chat_tokenizer, monkeypatch):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + TEMPLATE
    monkeypatch.setattr(chat_tokenizer, "chat_template", refusing)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    rows = [{"problem": system, "answer": "2"}, {"problem": "1+2?", "answer": "3"}]
    loaded = load(write(tmp_path / "chat.jsonl", rows), replace(RAW, template="chat"), chat_tokenizer, "math")
    assert [prompt.id for prompt in loaded.prompts] == ["chat/2"]
    assert loaded.drops == [Drop("chat.jsonl", 1, "problem", "refused by the chat template", "no system message")]


def test_an_answer_that_is_no_json_is_the_verifiers_fault(tmp_path, tokenizer):
    (tmp_path / "sets.py").write_text("ISOLATED = True\nread_answer = set\nverify = None\n")
    path = write(tmp_path / "rows.jsonl", [{"prompt": "1+1?", "answer": "2"}])
    with pytest.raises(ConfigError, match=r"read_answer returned \{'2'\}, which is not JSON .*: it must return text"):
        load(path, RAW, tokenizer, str(tmp_path / "sets.py"))


def test_a_verifier_that_fails_on_an_answer_is_named(tmp_path, tokenizer):
    (tmp_path / "own.py").write_text("ISOLATED = True\nread_answer = lambda value: value['gold']\nverify = None\n")
    path = write(tmp_path / "rows.jsonl", [{"prompt": "1+1?", "answer": "two"}])
    with pytest.raises(ConfigError, match=r"read_answer\('two'\) failed with TypeError: .*it must raise ValueError"):
        load(path, RAW, tokenizer, str(tmp_path / "own.py"))


def test_a_prompt_that_comes_to_no_token_is_none(tmp_path):
    ones = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"1": 0}, merges=[])))
    rows = [{"prompt": "11", "answer": "1"}, {"prompt": "two", "answer": "2"}]
    loaded = load(write(tmp_path / "rows.jsonl", rows), RAW, ones, "math")
    assert [prompt.token_ids for prompt in loaded.prompts] == [(0, 0)]
    assert [(drop.row, drop.reason) for drop in loaded.drops] == [(2, "no prompt")]


def test_a_token_that_the_model_lacks_is_refused(tmp_path, tokenizer):
    loaded = load(write(tmp_path / "rows.jsonl", [{"prompt": "1+1?", "answer": "2"}]), RAW, tokenizer, "math")
    largest = max(loaded.prompts[0].token_ids)
    loaded.check_ids(largest + 1, "models/tiny")
    with pytest.raises(ConfigError, match=f"models/tiny: prompt rows/1 holds token {largest}, but the model has"):
        loaded.check_ids(largest, "models/tiny")


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"problem": "q", "answer": None}, "a.jsonl row 2, answer: no answer"),
        ({"problem": "x" * 101, "answer": "1"}, r"row 2, problem: longer than data.max_prompt_length=100 tokens \(101"),
        ("{", "row 2, row: unreadable"),
        ({"problem": "Find x.", "images": ["a.png"], "answer": "1"}, "row 2, images: asks about a picture"),
        ({"problem": "Find x.", "video": "a.mp4", "answer": "1"}, "row 2, video: asks about a picture"),
        ({"problem": "q", "answer": '["1", "2"]'}, "row 2, answer: not an answer for this verifier .is a list of 2"),
        ({"problem": "q", "answer": ["1", "2"]}, "row 2, answer: not an answer for this verifier"),
        ('{"problem": "q", "answer": 1e400}', "row 2, answer: no answer"),
        ('{"problem": "half \\ud83d", "answer": "1"}', "row 2, problem: unreadable"),
        ("[" * 100_000, "row 2, row: unreadable"),
        ("\n{", "row 3, row: unreadable"),  # the line that an editor shows, blank ones counted
    ],
)
def test_strict_stops_at_the_first_bad_row(tmp_path, tokenizer, bad, says):
    path = write(tmp_path / "a.jsonl", [ROWS[0], bad, {"problem": "later", "answer": None}, ROWS[1]])
    strict = DataConfig(template="raw", max_prompt_length=100, strict=True)
    with pytest.raises(ConfigError, match=says) as raised:
        load(path, strict, tokenizer, "math")
    assert "data.strict=false" in str(raised.value)
    assert len(load(path, RAW, tokenizer, "math")) == 2


def test_files_that_cannot_be_used_say_why(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"problem": "q", "answer": "1"}\n' * 999)[:-20])
    broken = bytearray(gzip.compress("".join(f'{{"problem": "{number}?"}}\n' for number in range(999)).encode()))
    broken[100:300] = bytes(200)  # in the middle, the ends being whole
    (tmp_path / "b.jsonl.gz").write_bytes(broken)
    (tmp_path / "a.json").write_text('{"problem": "q"}')
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "fields.jsonl", [{"task": "q", "answer": "1"}])
    write(tmp_path / "gold.jsonl", [{"problem": "q", "result": "1"}])
    write(tmp_path / "none.jsonl", [{"problem": "q", "answer": None}])
    write(tmp_path / "empty.jsonl", [])
    for name, says in {
        "absent.jsonl": "no such file",
        "a.txt": "none of .jsonl",
        "a.parquet": "cannot be read as parquet",
        "a.jsonl.gz": "not a whole gzip file",
        "b.jsonl.gz": "not a whole gzip file",
        "a.json": "must hold one JSON list",
        "b.json": "not valid JSON",
        "folder": "arrow files",
        "fields.jsonl": "no field prompt or problem or question or Question, but task, answer: set data.prompt_field",
        "gold.jsonl": "but problem, result: set data.answer_field",
        "none.jsonl": "no usable row.*row 1, answer: no answer",
        "empty.jsonl": "no usable row",
    }.items():
        with pytest.raises(ConfigError, match=says):
            load(tmp_path / name, RAW, tokenizer, "math")
    with pytest.raises(ConfigError, match="no field gold, but problem, answer: set data.answer_field"):
        path = write(tmp_path / "ok.jsonl", ROWS)
        load(path, DataConfig(template="raw", answer_field="gold"), tokenizer, "math")
    with pytest.raises(ConfigError, match="unknown verifier 'maths'; did you mean 'math'"):
        load(path, RAW, tokenizer, "maths")


def test_an_integer_is_one_answer_whatever_the_file_made_of_it() -> None:
    same = [7, 7.0, "7", "7.0", "007", " 7. ", "+7", "007.00"]
    assert {str(plain(value)) for value in same} == {"7"}
    assert [plain(value) for value in ("-07", "-0", "000", "0.5", 0.5, "1e3", "07a", "", None, True)] == [
        *("-7", "0", "0", "0.5", 0.5, "1e3", "07a", "", None, True)
    ]
    assert plain("0" * 5000 + "9" * 5000) == "9" * 5000  # more digits than int() takes
    assert plain({"target": "07"}) == {"target": "07"} and plain(float("inf")) == float("inf")


def test_rows_without_an_answer_in_their_solution_are_dropped(tmp_path, tokenizer):
    rows = [
        {"problem": "a", "solution": r"\boxed{1}"},
        {"problem": "b", "solution": "it is 2"},
        {"problem": "c", "solution": float("nan")},
    ]
    loaded = load(write(tmp_path / "a.json", rows), RAW, tokenizer, "math")
    assert [prompt.answer for prompt in loaded.prompts] == ["1"]
    assert [(drop.row, drop.reason, drop.detail) for drop in loaded.drops] == [
        (2, "no answer", r"a solution without \boxed"),
        (3, "no answer", ""),
    ]
    rows = [{"problem": row["problem"], "meta": {"solution": row["solution"]}} for row in rows[:2]]
    inside = load(write(tmp_path / "b.json", rows), replace(RAW, answer_field="meta.solution"), tokenizer, "math")
    assert [(drop.row, drop.detail) for drop in inside.drops] == [(2, r"a solution without \boxed")]


REPEATED = [
    {"problem": "one", "answer": "1"},
    {"problem": " one\n", "answer": 1.0},
    {"problem": "two", "answer": "2"},
    {"problem": "two", "answer": "02"},
    {"problem": "which", "answer": "3"},
    {"problem": "which", "answer": "3"},
    {"problem": "which", "answer": "4"},
    {"problem": DAPO.replace("{prompt}", "one"), "answer": "1"},
]


def test_a_question_comes_once_and_contradictions_never(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", REPEATED)
    loaded = load(path, DataConfig(template="raw"), tokenizer, "math")
    assert [prompt.id for prompt in loaded.prompts] == ["a/1", "a/3"]
    assert Counter(drop.reason for drop in loaded.drops) == {"repeats an earlier row": 3, "contradicting answers": 3}
    assert [drop.detail for drop in loaded.drops] == [
        *("a.jsonl row 1", "a.jsonl row 3"),
        *("3, but 4 in a.jsonl row 7", "3, but 4 in a.jsonl row 7", "4, but 3 in a.jsonl row 5"),
        "a.jsonl row 1",
    ]
    assert "1 questions have contradicting answers (all their rows are dropped)" in loaded.report
    kept = load(path, DataConfig(template="raw", repeats="keep"), tokenizer, "math")
    assert len(kept) == 8 and kept.drops == []
    assert kept.report[1:] == ["1 questions have contradicting answers (kept: data.repeats=keep)"]


def test_one_question_behind_two_openings_is_two(tmp_path, tokenizer):
    rows = [
        {"problem": [{"role": "system", "content": text}, {"role": "user", "content": "go on"}], "answer": answer}
        for text, answer in (("Count by 2.", "2"), ("Count by 3.", "3"))
    ]
    assert len(load(write(tmp_path / "a.jsonl", rows), RAW, tokenizer, "math")) == 2


def test_one_answer_in_two_spellings_is_no_contradiction(tmp_path, tokenizer):
    spellings = [(r"\frac{1}{2}", r"\dfrac12"), ("0.5", ".5"), ("1,000", "1000"), ("(1,2)", "(1, 2)"), ("$2 n$", "2n")]
    rows = [{"problem": f"q{number}", "answer": text} for number, pair in enumerate(spellings) for text in pair]
    rows += [{"problem": "which", "answer": text} for text in ("1 2", "12")]
    loaded = load(write(tmp_path / "a.jsonl", rows), DataConfig(template="raw"), tokenizer, "math")
    assert [(prompt.text, prompt.answer) for prompt in loaded.prompts] == [
        *(("q0", r"\frac{1}{2}"), ("q1", "0.5"), ("q2", "1,000"), ("q3", "(1,2)"), ("q4", "2 n"))
    ]
    assert Counter(drop.reason for drop in loaded.drops) == {"repeats an earlier row": 5, "contradicting answers": 2}


def test_a_name_a_unit_or_an_order_makes_no_contradiction(tmp_path, tokenizer):
    pairs = [(r"90^\circ", "90"), (r"5\text{ cm}", "5"), ("x=5", "5"), ("1, 2", "2,1"), ('["7"]', "7"), (r"50\%", "50")]
    rows = [{"problem": f"q{place}", "answer": text} for place, pair in enumerate(pairs) for text in pair]
    loaded = load(write(tmp_path / "a.jsonl", rows), RAW, tokenizer, "math")
    assert [prompt.text for prompt in loaded.prompts] == ["q0", "q1", "q2", "q3", "q4"], loaded.report


def test_strict_stops_at_a_contradiction_but_not_at_a_repeat(tmp_path, tokenizer):
    strict = DataConfig(template="raw", strict=True)
    assert len(load(write(tmp_path / "a.jsonl", REPEATED[:4]), strict, tokenizer, "math")) == 2
    with pytest.raises(ConfigError, match=r"b.jsonl row 5, problem: contradicting answers \(3, but 4 in b.jsonl row 7"):
        load(write(tmp_path / "b.jsonl", REPEATED), strict, tokenizer, "math")


def test_a_prompt_that_came_in_a_chat_template_is_used_as_it_is(tmp_path, chat_tokenizer):
    """Rows 1 to 3 as the published AIME25 x8, knights-and-knaves and Llama 3 files hold them."""
    ready = ["1+1=?<| Assistant |>", "<|im_start|>user\n2?<|im_end|>\n", "<|start_header_id|>user<|end_header_id|>3?"]
    path = write(tmp_path / "a.jsonl", [{"prompt": text, "answer": "7"} for text in [*ready, "plain, |x| < 3"]])
    for template, last in (
        ("chat", "<user>plain, |x| < 3\n<bot>"),
        ("r1_zero", R1_ZERO.replace("{prompt}", "plain, |x| < 3")),
    ):
        loaded = load(path, DataConfig(template=template), chat_tokenizer, "math")
        assert [prompt.text for prompt in loaded.prompts] == [*ready, last]
        assert loaded.report[1] == (
            "3 prompts hold turns of a chat template already (<| Assistant |>, <|im_start|>, <|start_header_id|>) and "
            "are used as they are, the first in a.jsonl row 1"
        )


def test_chat_does_not_wrap_the_whole_prompt_of_a_base_model(tmp_path, chat_tokenizer):
    path = write(tmp_path / "a.jsonl", [{"prompt": R1_ZERO.replace("{prompt}", "1+1=?"), "answer": "7"}])
    (prompt,) = load(path, DataConfig(), chat_tokenizer, "math").prompts
    assert prompt.text == "<user>1+1=?\n<bot>"


def test_gpqa_rows_become_four_choices(tmp_path, tokenizer):
    wrong = {f"Incorrect Answer {index}": f"wrong {index}" for index in (1, 2, 3)}
    rows = [{"Question": f"q{index}?", "Correct Answer": "right", **wrong, "Record ID": "x"} for index in range(40)]
    prompts = load(write(tmp_path / "a.jsonl", rows), DataConfig(template="raw"), tokenizer, "choice").prompts
    for prompt in prompts:
        lines = prompt.text.splitlines()
        assert sorted(line[3:] for line in lines[-4:]) == ["right", "wrong 1", "wrong 2", "wrong 3"]
        assert f"{prompt.answer}) right" in lines
    assert {prompt.answer for prompt in prompts} == set("ABCD")


@pytest.mark.parametrize("field", ["", "test", "test_list"])
def test_rows_with_tests_in_columns_are_their_own_answer(tmp_path, tokenizer, field):
    head = "def f(x):\n"
    check = "def check(candidate):\n    assert candidate(2) == 4\n"
    human_eval = {"task_id": 1, "prompt": head, "entry_point": "f", "canonical_solution": "    return 4", "test": check}
    mbpp = {"prompt": "Round.", "test_imports": ["import math"], "test_list": ["assert f(2) == math.ceil(1.5)"]}
    expected = {
        "test": {"prompt": head, "tests": check, "entry_point": "f"},
        "test_list": {"prompt": "", "tests": f"import math\n{mbpp['test_list'][0]}\n", "entry_point": ""},
    }
    data = replace(RAW, answer_field=field)
    for name, row in {"test": human_eval, "test_list": mbpp}.items():
        if field in ("", name):
            path = write(tmp_path / f"{name}.jsonl", [row])
            assert load(path, data, tokenizer, "code").prompts[0].answer == expected[name]


def test_mbpp_asks_for_what_its_tests_call(tmp_path, chat_tokenizer):
    """Two of its tasks may be word for word the same, and differ in what is tested."""
    rows = [
        {"prompt": "Round up.", "test_list": [f"assert {name}(1.5) == 2", f"assert {name}(1) == 1"]} for name in "fg"
    ]
    plus = {
        "prompt": "Round down.",
        "test_list": ["assert h(1.5) == 1"],
        "test": "for x in range(99):\n    assert h(x) == x",
    }
    shown = "Round up.\nYour code should pass these tests:\n\nassert f(1.5) == 2\nassert f(1) == 1"
    path = write(tmp_path / "a.jsonl", [*rows, plus])
    loaded = load(path, DataConfig(), chat_tokenizer, "code")
    assert loaded.prompts[0].text == f"<user>{shown}\n<bot>" and len(loaded) == 3 and loaded.drops == []
    assert "assert h(1.5) == 1" in loaded.prompts[2].text and "range" not in loaded.prompts[2].text
    named = load(path, replace(RAW, prompt_field="prompt"), chat_tokenizer, "code")
    assert [prompt.text for prompt in named.prompts] == ["Round down."]  # as asked: the others contradict each other
    whole = {"text": "Root.", "code": "def g(x): ...", "test_list": ["assert g(4) == 2"], "challenge_test_list": []}
    for setup, tests in (("", "assert g(4) == 2"), ("import math", "import math\nassert g(4) == 2")):
        path = write(tmp_path / "whole.jsonl", [whole | {"test_setup_code": setup}])
        (prompt,) = load(path, RAW, chat_tokenizer, "code").prompts
        assert prompt.text == "Root.\nYour code should pass these tests:\n\nassert g(4) == 2"
        assert prompt.answer["tests"].strip() == tests
    again = [{"prompt": shown, "test_list": rows[0]["test_list"]}]
    assert load(write(tmp_path / "b.jsonl", again), RAW, chat_tokenizer, "code").prompts[0].text == shown


def test_a_folder_of_datasets_and_its_splits(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS[:1] + ROWS[2:])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    for folder in ("one", "splits/test"):
        loaded = load(tmp_path / folder, RAW, tokenizer, "math")
        assert [(prompt.text, prompt.answer) for prompt in loaded.prompts] == [("1+1=?", "2"), ("pi", r"\pi")]
    with pytest.raises(ConfigError, match="splits holds the splits train, test: name one, as .*/splits/train"):
        load(tmp_path / "splits", RAW, tokenizer, "math")


def test_hub_names(tmp_path, tokenizer, monkeypatch):
    """A folder OWNER/NAME where the run starts stands for the hub's: the same library reads both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "maths/easy").mkdir(parents=True)
    write(tmp_path / "maths/easy/test.jsonl", ROWS[:1])
    (prompt,) = load("hub:maths/easy@test", RAW, tokenizer, "math").prompts
    assert (prompt.id, prompt.text, prompt.answer) == ("hub:maths/easy@test/1", "1+1=?", "2")
    with pytest.raises(ConfigError, match="hub:maths/easy cannot be loaded from the hub: .*train.*the path of a local"):
        load("hub:maths/easy", RAW, tokenizer, "math")
    with pytest.raises(ConfigError, match="hub:maths must look like hub:OWNER/NAME"):
        load("hub:maths", RAW, tokenizer, "math")


def test_a_mixture_names_its_rows_and_reads_each_source_with_its_own_fields(tmp_path, tokenizer):
    (tmp_path / "b").mkdir()
    one = write(tmp_path / "train.jsonl", [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": "2"}])
    two = write(tmp_path / "b/train.jsonl", [{"problem": "c", "gold": "3"}, {"problem": "a", "gold": "1"}])
    three = write(tmp_path / "other.json", [{"question": "b", "answer": "5"}, {"question": "d", "answer": "4"}])
    sources = [SourceConfig(str(one), weight=3), SourceConfig(str(two), answer_field="gold"), SourceConfig(str(three))]
    loaded = load_prompts(sources, DataConfig(template="raw"), tokenizer, "math")
    assert [prompt.text for prompt in loaded.prompts] == ["a", "c", "d"]
    assert len({prompt.id for prompt in loaded.prompts}) == 3 and loaded.prompts[2].id == "other/2"
    assert loaded.report[:3] == [
        f"{one}: 1 of 2 rows are prompts, 60.0% of an epoch",
        f"{two}: 1 of 2 rows are prompts, 20.0% of an epoch",
        "other.json: 1 of 2 rows are prompts, 20.0% of an epoch",
    ]
    assert [(drop.row, drop.reason) for drop in loaded.drops if drop.source == str(two)] == [
        (2, "repeats an earlier row")
    ]
    same = write(tmp_path / "other.jsonl", [{"question": "e", "answer": "5"}, {"question": "f", "answer": "4"}])
    loaded = load_prompts([*sources, SourceConfig(str(same))], DataConfig(template="raw"), tokenizer, "math")
    assert [prompt.id for prompt in loaded.prompts][2:] == ["other.json/2", "other.jsonl/1", "other.jsonl/2"]
    with pytest.raises(ConfigError, match="no usable row in other.json"):
        write(three, [{"question": "a", "answer": "1"}])
        load_prompts(sources, DataConfig(template="raw"), tokenizer, "math")


DATA = os.environ.get("MEGATRON_RLVR_DATA", "")


@pytest.mark.real_data
def test_the_published_training_sets_from_one_line_each():
    """Counts from the files themselves; ``data.sources`` needs nothing but the paths."""
    names = ("dapo_math_17k.parquet", "math_train_7500.json", "aime_1984_2023.json", "gsm8k_train.jsonl")
    config = from_dict(DataConfig, {"sources": [{"path": f"{DATA}/train/{name}"} for name in names], "template": "raw"})
    config.max_prompt_length = 100_000
    loaded = load_prompts(config.train_sources, config, Characters(), "math")
    by_source = {name: Counter(drop.reason for drop in loaded.drops if drop.source == name) for name in names}
    dapo = pq.read_table(Path(DATA, "train/dapo_math_17k.parquet")).to_pylist()
    golds = defaultdict(list)
    for row in dapo:
        golds[row["prompt"][0]["content"].strip()].append(row["reward_model"]["ground_truth"])
    bad = {question: answers for question, answers in golds.items() if len(set(answers)) > 1}
    rows_of_bad = sum(map(len, bad.values()))
    assert (len(dapo), len(golds), len(dapo) - len(golds), len(bad)) == (17_917, 17_255, 662, 12)
    assert by_source["dapo_math_17k.parquet"] == {
        "contradicting answers": rows_of_bad,
        "repeats an earlier row": 662 - (rows_of_bad - 12),
    }
    # MATH's own four: two null, two empty. The rest DAPO holds too, four of them among its contradicting twelve.
    assert by_source["math_train_7500.json"] == {
        "no answer": 4,
        "repeats an earlier row": 1_719,
        "contradicting answers": 4,
    }
    for name, drops in (
        ("math_train_7500.json", {"no answer": 4}),
        ("aime_1984_2023.json", {}),
        ("gsm8k_train.jsonl", {}),
    ):
        alone = load(Path(DATA, "train", name), config, Characters(), "math")
        assert Counter(drop.reason for drop in alone.drops) == drops
    assert "12 questions have contradicting answers (all their rows are dropped)" in loaded.report
    of_dapo = [prompt for prompt in loaded.prompts if prompt.id.startswith("dapo_math_17k/")]
    assert len(of_dapo) == 17_255 - 12 and max(len(prompt.text) for prompt in of_dapo) == 3_190
    assert sum(prompt.answer.startswith("-") for prompt in of_dapo) > 300
    kept = load_prompts(config.train_sources[:1], replace(config, repeats="keep"), Characters(), "math")
    assert len(kept) == 17_917 and kept.drops == []
    assert sum(prompt.answer.startswith("-") for prompt in kept.prompts) == 366
    assert sum(len(prompt.answer) > 15 for prompt in kept.prompts) == 5
    assert sum(bool(re.search("[一-鿿]", prompt.text)) for prompt in kept.prompts) == 3_432


@pytest.mark.real_data
def test_every_task_of_mbpp_names_the_function_that_its_tests_call():
    config = DataConfig(template="raw", max_prompt_length=100_000)
    loaded = load(Path(DATA, "other/mbpp_new.json"), config, Characters(), "code")
    assert len(loaded) == 399 and loaded.drops == []
    for prompt in loaded.prompts:
        assert prompt.answer["tests"].strip().rpartition("\n")[2] in prompt.text


@pytest.mark.real_data
def test_real_prompts_are_filtered_by_length():
    dapo = Path(DATA, "train/dapo_math_17k.parquet")
    loaded = load(dapo, DataConfig(template="raw", max_prompt_length=512), Characters(), "math")
    long = [drop for drop in loaded.drops if drop.reason.startswith("longer")]
    assert len(loaded) + len(long) == 17_255 - 12 and all(len(prompt.token_ids) <= 512 for prompt in loaded.prompts)
    assert f"dropped {len(long)} rows (longer than data.max_prompt_length=512 tokens): dapo" in "\n".join(loaded.report)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        *(("aime24.jsonl", 30), ("aime25.jsonl", 30), ("amc23.jsonl", 40), ("math500.jsonl", 500)),
        *(("minerva.jsonl", 272), ("gsm8k_test.jsonl", 1319), ("aime24_dapo.parquet", 30)),
    ],
)
def test_the_published_benchmarks_need_no_fields_named(name, prompts):
    data = DataConfig(template="raw", max_prompt_length=100_000)
    loaded = load(Path(DATA, "eval", name), data, Characters(), "math")
    assert len(loaded) == prompts and all(0 < len(prompt.answer) < 300 for prompt in loaded.prompts)
    if name.startswith(("aime", "amc")):
        assert all(re.fullmatch(r"-?(0|[1-9]\d*)", prompt.answer) for prompt in loaded.prompts)
    if name == "aime24_dapo.parquet":
        assert {drop.reason for drop in loaded.drops} == {"repeats an earlier row"} and len(loaded.drops) == 930
