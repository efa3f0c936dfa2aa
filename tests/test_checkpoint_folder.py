"""Which folders are checkpoints, what a kill may leave beside them, and which ones stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlvr.checkpoint_folder import (
    checkpoints,
    clear_leftovers,
    damage,
    inventory,
    remove,
    seal,
    superfluous,
)


def make(run: Path, step: int, content: str = "weights") -> Path:
    """A sealed checkpoint of three small files."""
    partial = run / "checkpoints" / f"step_{step}.partial"
    (partial / "policy").mkdir(parents=True)
    (partial / "run.json").write_text("{}")
    (partial / "policy/.metadata").write_text("list")
    (partial / "policy/__0_0.distcp").write_text(content)
    return seal(partial, inventory(partial, [path for path in partial.rglob("*") if path.is_file()]))


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


def test_only_a_sealed_folder_is_a_checkpoint_and_the_latest_has_the_highest_step(tmp_path: Path) -> None:
    assert checkpoints(tmp_path) == []
    for step in (9, 10, 100):
        make(tmp_path, step)
    (tmp_path / "checkpoints/step_101.partial").mkdir()
    (tmp_path / "checkpoints/step_8.deleted").mkdir()
    assert names(tmp_path) == ["step_9", "step_10", "step_100"]
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_10", "step_100", "step_9"]


def test_a_new_checkpoint_takes_the_place_of_one_of_the_same_step(tmp_path: Path) -> None:
    make(tmp_path, 3, "old")
    path = make(tmp_path, 3, "new")
    assert (path / "policy/__0_0.distcp").read_text() == "new" and damage(path) == ""
    assert names(tmp_path) == ["step_3"] and len(list((tmp_path / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("replaced", [False, True])
def test_a_removed_one_loses_its_name_before_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """Killed while it deletes: what is left is no checkpoint, and the next one clears it away."""
    path = make(tmp_path, 3)

    def killed(*arguments: object, **options: object) -> None:
        if not options:
            raise KeyboardInterrupt

    monkeypatch.setattr("megatron_rlvr.checkpoint_folder.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 3) if replaced else remove(path)
    monkeypatch.undo()
    assert checkpoints(tmp_path) == []
    clear_leftovers(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_a_kill_left_of_one_is_in_no_ones_way(tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "checkpoints/step_3.deleted/policy").mkdir(parents=True)
        remove(make(tmp_path, 3))
        assert list((tmp_path / "checkpoints").iterdir()) == []


def test_without_reading_the_sizes_and_the_runs_state_are_looked_at(tmp_path: Path) -> None:
    path = make(tmp_path, 3)
    (path / "policy/__0_0.distcp").write_text("weighst")
    assert damage(path, read=False) == ""
    (path / "run.json").write_text("[]")
    assert damage(path, read=False).startswith("run.json has changed since it was written")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("policy/__0_0.distcp", "weight", "policy/__0_0.distcp has 6 bytes instead of 7"),
        ("policy/__0_0.distcp", "weighst", "policy/__0_0.distcp has changed since it was written"),
        ("policy/__0_0.distcp", None, "policy/__0_0.distcp is missing"),
        ("manifest.json", None, "manifest.json is missing"),
        ("manifest.json", '{"run.json": {"by', "manifest.json cannot be read"),
        ("manifest.json", "[]", "manifest.json is not the list of a checkpoint"),
        ("manifest.json", "{}", "manifest.json is not the list of a checkpoint"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = make(tmp_path, 3)
    (path / name).unlink() if content is None else (path / name).write_text(content)
    assert damage(path).startswith(message)
    # ranks share the files: what is wrong with one is found by exactly one of them, unless it is the manifest
    found = [damage(path, part, parts=3) for part in range(3)]
    assert sum(bool(text) for text in found) == (3 if name == "manifest.json" else 1)


def test_a_manifest_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    path = make(tmp_path, 3)
    (tmp_path / "secret").write_text("secret")
    entries = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(entries | {"../../secret": entries["run.json"]}))
    assert damage(path) == "manifest.json names ../../secret, which is not in the folder"


def test_the_newest_and_the_best_stay() -> None:
    steps, scores = [10, 20, 30, 40, 50], {10: 0.5, 20: 0.9, 30: 0.6, 40: 0.9}
    assert superfluous(steps, scores, keep_last=2, keep_best=0) == [10, 20, 30]
    assert superfluous(steps, scores, keep_last=1, keep_best=1) == [10, 20, 30]  # of equals the newer
    assert superfluous(steps, scores, keep_last=1, keep_best=2) == [10, 30]
    assert superfluous(steps, {}, keep_last=1, keep_best=2) == [10, 20, 30, 40]  # none is known to be good
    assert superfluous([10], {}, keep_last=3, keep_best=0) == []


def test_the_best_stay_from_the_first_one_that_is_measured() -> None:
    """Step by step, as a run asks: a checkpoint's score is known one step later, so at first few are scored."""
    scores = {10: 0.1, 20: 0.2, 30: 0.9, 40: 0.3, 50: 0.8, 60: 0.4, 70: 0.7}
    there: list[int] = []
    for step in scores:
        there.append(step)
        known = {earlier: score for earlier, score in scores.items() if earlier < step}
        gone = superfluous(there, known, keep_last=1, keep_best=4)
        assert gone == ([] if len(known) <= 4 else [min(known.keys() & set(there), key=scores.__getitem__)])
        there = [kept for kept in there if kept not in gone]
    assert there == [30, 40, 50, 60, 70]
    assert superfluous([10, 20, 30], {20: 0.2}, keep_last=1, keep_best=3) == [10]  # 0 < scored < keep_best - 1
