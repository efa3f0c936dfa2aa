"""Prompt data sets: formats, fields, what is dropped, and an order that can be resumed."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rlvr.config import ConfigError, DataConfig
from megatron_rlvr.prompts import Drop, load_prompts
from megatron_rlvr.templates import DAPO, R1_ZERO

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


RAW = DataConfig(template="raw", max_prompt_length=100)
ROWS = [{"problem": "1+1=?", "answer": "2"}, {"problem": "三角形?", "answer": 3.0}, {"problem": "pi", "answer": r"\pi"}]


def write(path: Path, rows: list) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.json", "train.parquet"])
def test_every_format_gives_the_same_prompts(tmp_path, tokenizer, name):
    rows = [row | {"answer": str(row["answer"])} for row in ROWS]  # parquet columns have one type
    loaded = load_prompts(write(tmp_path / name, rows), RAW, tokenizer, "math")
    assert [prompt.id for prompt in loaded.prompts] == ["train/1", "train/2", "train/3"]
    assert [prompt.text for prompt in loaded.prompts] == ["1+1=?", "三角形?", "pi"]
    assert [prompt.answer for prompt in loaded.prompts] == ["2", "3.0", r"\pi"]
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
        ({"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "7"}, "answer": "no"}, {}),
        (
            {"prompt": "no", "body": {"text": "q"}, "answer": "no", "gold": "7"},
            {"prompt_field": "body.text", "answer_field": "gold"},
        ),
    ],
)
def test_fields_are_detected_and_explicit_ones_win(tmp_path, tokenizer, row, data):
    config = DataConfig(template="raw", **data)
    (prompt,) = load_prompts(write(tmp_path / "a.jsonl", [row]), config, tokenizer, "math").prompts
    assert (prompt.text, prompt.answer) == ("q", "7")


def test_countdown_rows(tmp_path, tokenizer):
    row = {"prompt": "3,5,7=38>", "answer": {"numbers": [3, 5, 7], "target": 38}}
    bad = row | {"answer": {"numbers": [3, 5, 7]}}
    for name in ("train.jsonl", "train.parquet"):
        loaded = load_prompts(write(tmp_path / name, [row, bad]), RAW, tokenizer, "countdown")
        assert [(prompt.text, prompt.answer) for prompt in loaded.prompts] == [(row["prompt"], row["answer"])]
        assert loaded.drops[0].reason == "not an answer for this verifier" and loaded.drops[0].row == 2


def test_templates(tmp_path, chat_tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    path = write(tmp_path / "a.jsonl", [{"prompt": messages, "answer": "7"}, {"prompt": "plain", "answer": "7"}])
    chat = load_prompts(path, DataConfig(), chat_tokenizer, "math").prompts
    assert [prompt.text for prompt in chat] == ["<system>Be brief.\n<user>q\n<bot>", "<user>plain\n<bot>"]
    assert chat_tokenizer.decode(chat[0].token_ids) == chat[0].text
    raw = load_prompts(path, RAW, chat_tokenizer, "math").prompts
    assert [prompt.text for prompt in raw] == ["q", "plain"]


def test_the_papers_templates_wrap_a_question_once(tmp_path, chat_tokenizer):
    wrapped = DAPO.replace("{prompt}", "1+{x}=?")
    path = write(tmp_path / "a.jsonl", [{"prompt": text, "answer": "7"} for text in ("1+{x}=?", wrapped)])
    for name, expected in (
        ("dapo", f"<user>{wrapped}\n<bot>"),
        ("r1_zero", R1_ZERO.replace("{prompt}", "1+{x}=?")),
        ("raw", None),
    ):
        config = DataConfig(template=name, max_prompt_length=1000)
        texts = [prompt.text for prompt in load_prompts(path, config, chat_tokenizer, "math").prompts]
        assert texts == ([expected, expected] if expected else ["1+{x}=?", wrapped])
    assert R1_ZERO.endswith("<think>") and DAPO.startswith("Solve the following math problem step by step.")


def test_a_tokenizer_without_chat_template_names_the_way_out(tmp_path, tokenizer):
    for template in ("chat", "dapo"):
        with pytest.raises(ConfigError, match=f"data.template={template}.*data.template=raw"):
            load_prompts(write(tmp_path / "a.jsonl", ROWS), DataConfig(template=template), tokenizer, "math")


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
    {"answer": "1"},
    {"problem": "x" * 100, "answer": 12.0},
    {"problem": "third without", "answer": ""},
    {"problem": "fourth without", "answer": None},
    {"problem": "fine too", "answer": "2"},
]


def test_bad_rows_are_counted_named_and_dropped(tmp_path, tokenizer):
    loaded = load_prompts(write(tmp_path / "bad.jsonl", BAD), RAW, tokenizer, "math")
    assert [prompt.id for prompt in loaded.prompts] == ["bad/1", "bad/12", "bad/15"]
    assert loaded.prompts[1].answer == "12" and len(loaded.prompts[1].token_ids) == 100
    assert [drop.row for drop in loaded.drops] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14]
    assert Counter(drop.reason for drop in loaded.drops) == {
        "no answer": 4,
        "unreadable": 2,
        "longer than data.max_prompt_length=100 tokens": 1,
        "no prompt": 3,
        "not an answer for this verifier": 1,
        "neither text nor a list of chat messages": 1,
    }
    assert loaded.drops[2] == Drop(4, "problem", "longer than data.max_prompt_length=100 tokens", "101 tokens")
    assert loaded.report[0] == "bad.jsonl: 3 of 15 rows are prompts"
    without = next(line for line in loaded.report if "(no answer)" in line)
    assert without == (
        "dropped 4 rows (no answer): bad.jsonl row 2, answer: no answer; bad.jsonl row 6, answer: no answer; "
        "bad.jsonl row 13, answer: no answer; ..."
    )


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"problem": "q", "answer": None}, "a.jsonl row 2, answer: no answer"),
        ({"problem": "x" * 101, "answer": "1"}, r"row 2, problem: longer than data.max_prompt_length=100 tokens \(101"),
        ("{", "row 2, row: unreadable"),
    ],
)
def test_strict_stops_at_the_first_bad_row(tmp_path, tokenizer, bad, says):
    path = write(tmp_path / "a.jsonl", [ROWS[0], bad, {"problem": "later", "answer": None}, ROWS[1]])
    strict = DataConfig(template="raw", max_prompt_length=100, strict=True)
    with pytest.raises(ConfigError, match=says) as raised:
        load_prompts(path, strict, tokenizer, "math")
    assert "data.strict=false" in str(raised.value)
    assert len(load_prompts(path, RAW, tokenizer, "math")) == 2


def test_files_that_cannot_be_used_say_why(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"problem": "q", "answer": "1"}\n' * 999)[:-20])
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
        "a.json": "must hold one JSON list",
        "b.json": "not valid JSON",
        "folder": "arrow files",
        "fields.jsonl": "no field prompt or problem or question, but task, answer: set data.prompt_field",
        "gold.jsonl": "but problem, result: set data.answer_field",
        "none.jsonl": "no usable row.*row 1, answer: no answer",
        "empty.jsonl": "no usable row",
    }.items():
        with pytest.raises(ConfigError, match=says):
            load_prompts(tmp_path / name, RAW, tokenizer, "math")
    with pytest.raises(ConfigError, match="no field gold, but problem, answer: set data.answer_field"):
        path = write(tmp_path / "ok.jsonl", ROWS)
        load_prompts(path, DataConfig(template="raw", answer_field="gold"), tokenizer, "math")
    with pytest.raises(ConfigError, match="unknown verifier 'maths'; did you mean 'math'"):
        load_prompts(path, RAW, tokenizer, "maths")


def test_the_order_is_a_pure_function_of_the_position(tmp_path, tokenizer):
    rows = [{"problem": f"q{index}", "answer": "1"} for index in range(23)]
    path = write(tmp_path / "a.jsonl", rows)
    loaded, again = (load_prompts(path, RAW, tokenizer, "math") for _ in range(2))

    def ids(prompts) -> list[str]:
        return [prompt.id for prompt in prompts]

    whole = ids(loaded.take(0, 100, seed=7, shuffle=True))
    for start, n in ((0, 5), (20, 8), (23, 23), (41, 59), (99, 1), (50, 0)):
        assert ids(again.take(start, n, seed=7, shuffle=True)) == whole[start : start + n]
    epochs = [whole[start : start + 23] for start in range(0, 92, 23)]
    assert all(sorted(epoch) == sorted(ids(loaded.prompts)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and ids(loaded.prompts) not in epochs
    assert ids(loaded.take(0, 100, seed=8, shuffle=True)) != whole
    assert ids(loaded.take(20, 6, seed=7, shuffle=False)) == ids(loaded.prompts)[20:] + ids(loaded.prompts)[:3]


DATA = os.environ.get("MEGATRON_RLVR_DATA", "")


@pytest.mark.real_data
def test_real_files(tokenizer):
    dapo, started = Path(DATA, "train/dapo_math_17k.parquet"), time.process_time()
    loaded = load_prompts(dapo, DataConfig(template="raw", max_prompt_length=512), tokenizer, "math")
    assert time.process_time() - started < 30  # CPU seconds; about six were measured
    rows = [
        (row["prompt"][0]["content"], row["reward_model"]["ground_truth"]) for row in pq.read_table(dapo).to_pylist()
    ]
    assert len(rows) == 17_917 and max(len(text) for text, _ in rows) == 3_190
    fits = [row for row in rows if len(row[0].encode()) <= 512]
    assert [(prompt.text, prompt.answer) for prompt in loaded.prompts] == fits
    assert loaded.prompts[0].id == "dapo_math_17k/1" and loaded.prompts[0].answer == "34"
    long = 17_917 - len(fits)
    assert len(loaded.drops) == long > 0
    assert loaded.report[1].startswith(f"dropped {long} rows (longer than data.max_prompt_length=512 tokens): dapo")
    for name, total, dropped, field in (
        ("train/math_train_7500.json", 7_474, 4, ""),
        ("train/gsm8k_train.jsonl", 7_473, 0, ""),
        ("eval/aime24.jsonl", 30, 0, ""),
        ("eval/aime25.jsonl", 30, 0, "expected_answer"),
        ("eval/amc23.jsonl", 40, 0, ""),
        ("eval/aime24_dapo.parquet", 960, 0, ""),
    ):
        data = DataConfig(template="raw", max_prompt_length=100_000, answer_field=field)
        loaded = load_prompts(Path(DATA, name), data, tokenizer, "math")
        assert (len(loaded) + len(loaded.drops), len(loaded.drops)) == (total, dropped), name
        assert all(len(prompt.answer) < 200 for prompt in loaded.prompts), name
