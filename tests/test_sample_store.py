"""Samples on disk: read back, cut where a killed writer left half a line, refused where they are of something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlvr.config import ConfigError
from megatron_rlvr.sample_store import SampleStore, StoredSample


def stored(index: int, **changed) -> StoredSample:
    values = {"reward": 1.0, "status": "ok", "extracted": "25", "tokens": 8, "finish_reason": "stop", "log_prob": -0.1}
    return StoredSample(f"p/{index}", 0, **{**values, "text": "so 25\n\u2028", **changed})


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "new" / "folder", {"seed": 0}, {})
    assert store.read("p") == {}
    store.append("p", [stored(1), stored(2)])
    store.append("p", [stored(3, log_prob=-1 / 3)])
    assert list(SampleStore(tmp_path / "new" / "folder", {"seed": 0}, {}).read("p").values()) == [
        *(stored(1), stored(2), stored(3, log_prob=-1 / 3))
    ]
    assert store.read("other") == {}


@pytest.mark.parametrize("kept", [0, 1])
def test_half_a_line_is_cut_off(tmp_path: Path, kept: int) -> None:
    store = SampleStore(tmp_path, {}, {})
    store.append("p", [stored(index) for index in range(kept)])
    path = tmp_path / "samples/p.jsonl"
    with path.open("a") as file:
        file.write('{"id": "p/9", "samp')
    assert len(store.read("p")) == kept
    store.append("p", [stored(7)])
    assert [item.id for item in store.read("p").values()] == [*(f"p/{index}" for index in range(kept)), "p/7"]


def test_a_damaged_line_and_a_full_disk_are_one_clear_error_each(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, {}, {})
    store.append("p", [stored(1)])
    path = tmp_path / "samples/p.jsonl"
    whole = path.read_text()
    for line, reason in (
        ('{"id": "p/9", oops}', "Expecting"),
        ('{"id": "p/9"}', "missing .* 'sample'"),
        ("[1]", "list"),
    ):
        path.write_text(f"{whole}{line}\n")
        with pytest.raises(ConfigError, match=rf"p.jsonl, line 2 is no sample \(.*{reason}.*delete the line"):
            store.read("p")
    (tmp_path / "samples/full.jsonl").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="cannot write .*full.jsonl: No space left on device; .*start again to go on"):
        store.append("full", [stored(1)])


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    SampleStore(tmp_path, {"seed": 0, "temperature": 0.6}, {}).append("p", [stored(1)])
    with pytest.raises(ConfigError, match="holds samples with temperature=0.6, not 1.0: name another output folder"):
        SampleStore(tmp_path, {"seed": 0, "temperature": 1.0}, {})
    assert len(SampleStore(tmp_path, {"seed": 0, "temperature": 0.6}, {}).read("p")) == 1
    SampleStore(tmp_path, {"seed": 0, "temperature": 0.6, "top_p": 0.9}, {})  # an earlier version wrote no top_p
    (tmp_path / "samples/p.jsonl").write_text("")
    SampleStore(tmp_path, {"seed": 0, "temperature": 1.0}, {})  # nothing was sampled: a first try that was mended
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make the output folder"):
        SampleStore(tmp_path / "file", {}, {})


@pytest.mark.parametrize("left", ["", "[1]", '{"seed": 0'])
def test_damaged_settings_are_one_clear_error(tmp_path: Path, left: str) -> None:
    SampleStore(tmp_path, {"seed": 0}, {})
    (tmp_path / "settings.json").write_text(left)
    with pytest.raises(
        ConfigError, match="settings.json is damaged, .*: name another output folder, or delete this one"
    ):
        SampleStore(tmp_path, {"seed": 0}, {})


def test_a_kill_leaves_whole_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, text: str) -> None:
        path.write_bytes(text[:5].encode())
        raise KeyboardInterrupt

    SampleStore(tmp_path, {"seed": 0}, {"aime24": "a"})
    before = (tmp_path / "settings.json").read_text()
    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(Path, "write_text", killed)
        SampleStore(tmp_path, {"seed": 0}, {"mine": "b"})
    assert (tmp_path / "settings.json").read_text() == before
    SampleStore(tmp_path, {"seed": 0}, {"mine": "b"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples", "settings.json"]


def test_an_outcome_counts_what_was_judged() -> None:
    assert stored(1).outcome.right is True and stored(1, reward=0.0).outcome.right is False
    lost = stored(1, status="timeout", reward=0.0).outcome
    assert lost.right is None and lost.answer is None
    assert stored(1, finish_reason="length").outcome.truncated


def test_what_was_right_is_still_so_when_it_is_read(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, {}, {})
    store.append("p", [stored(1, reward=1.0, right=False), stored(2, reward=0.5, right=True)])
    assert [item.outcome.right for item in store.read("p").values()] == [False, True]
    lines = (tmp_path / "samples/p.jsonl").read_text().splitlines()
    earlier = [{name: value for name, value in json.loads(line).items() if name != "right"} for line in lines]
    (tmp_path / "samples/p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in earlier))
    assert [item.outcome.right for item in store.read("p").values()] == [True, False]  # the reward is all there is


def test_samples_of_other_problems_by_the_same_name_are_refused(tmp_path: Path):
    SampleStore(tmp_path, {"seed": 0}, {"aime24": "z"})
    store = SampleStore(tmp_path, {"seed": 0}, {"aime24": "a"})  # nothing was sampled: a verifier may be mended
    SampleStore(tmp_path, {"seed": 0}, {"mine": "b"})  # another benchmark joins
    for name in ("aime24", "mine"):
        store.append(name, [stored(1)])
    for name, digest in {"aime24": "b", "mine": "c"}.items():
        with pytest.raises(ConfigError, match=f"other problems by the name of {name}, whose file, answers or verifier"):
            SampleStore(tmp_path, {"seed": 0}, {name: digest})
    SampleStore(tmp_path, {"seed": 0}, {"aime24": "a", "mine": "b"})
