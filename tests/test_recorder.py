"""Every number of the flight recorder is the step's own, at its own token, however the ranks share the responses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.vocab import TokenStatistics
from megatron_rlvr.packing import pack
from megatron_rlvr.recorder import FlightRecorder
from megatron_rlvr.token_records import (
    MOST_TOKENS,
    Recording,
    TokenWriter,
    page_path,
    read_record,
    record_path,
    recorded_steps,
)
from megatron_rlvr.types import Batch, RolloutGroup
from megatron_rlvr.verdict import Verdict
from tests.ranks import run_ranks
from tests.tiny import make_groups

PROMPTS, RESPONSES, UPDATES = 4, 4, 2
UNJUDGED = 4  # place in the step of a response without a reward; the recorder chooses it too
FIELDS = {"old_log_probs": 1, "entropy": 2, "advantages": 3}


def scored_groups() -> list[RolloutGroup]:
    groups = make_groups(PROMPTS, RESPONSES)
    for group in groups:
        for rollout in group.rollouts:
            rollout.verdict = Verdict(1.0, "ok")
    return groups


def code(batch: Batch, column: int) -> torch.Tensor:
    """[T] a number that names its response, its place in it and its column; exact in fp32, small enough for a ratio."""
    of_response = batch.response_ids[batch.response_index]
    return ((of_response * 64 + batch.position_ids) * 16 + column).float() / 2**15


def step(
    recorder: FlightRecorder, groups: ParallelGroups, old_pass: bool, learns: bool = True
) -> tuple[Recording, list[RolloutGroup]]:
    """A step's passes over a batch whose every value is its own name."""
    rollouts = scored_groups()
    rewards: list[list[float | None]] = [[1.0] * RESPONSES for _ in range(PROMPTS)]
    rewards[UNJUDGED // RESPONSES][UNJUDGED % RESPONSES] = None
    batch = pack(
        rollouts, rewards, updates=UPDATES, microbatch_tokens=60, dp_rank=groups.dp_rank, dp_size=groups.dp_size
    )
    recorder.start(batch, rollouts)
    codes = [code(batch, column) for column in range(12)]
    batch.advantages, batch.values = codes[3], torch.stack([codes[4], codes[4] + 2], dim=1)
    batch.extras["method/amount"] = codes[5]
    old = TokenStatistics(codes[1], codes[2], codes[0], codes[0], -codes[6], proxy(codes[7], batch), codes[8])
    if old_pass:
        batch.old_log_probs, batch.entropy = codes[1], codes[2]
        recorder.old_policy(batch, old)
    if groups.is_last_stage and learns:
        for update in batch.updates:
            for first, last in update.microbatches:
                micro = batch.microbatch(first, last)
                rows = slice(int(batch.cu_seqlens[first]), int(batch.cu_seqlens[last]))
                now = TokenStatistics(*(getattr(old, name)[rows] for name in list(vars(old))[:7]))
                if not old_pass:
                    micro.old_log_probs, micro.entropy = now.log_prob, now.entropy
                    recorder.old_policy(micro, now)
                micro.extras["method/selected"] = codes[9][rows] * 2**11 % 2 == 1
                moved = TokenStatistics(now.log_prob + codes[10][rows], *list(vars(now).values())[1:7])
                recorder.loss(micro, moved, micro.position_ids % 3 == 0)
    return recorder.collect(batch), rollouts


def one_rank(count: int, learns: bool = True, thresholded: bool = True) -> tuple[Recording, list[RolloutGroup]]:
    return step(FlightRecorder(count, thresholded, ParallelGroups.single()), ParallelGroups.single(), True, learns)


def proxy(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    return torch.where(batch.position_ids % 2 == 0, values, -torch.inf)


def on_rank(layout: dict[str, int], old_pass: bool, folder: str) -> dict[str, torch.Tensor]:
    groups = ParallelGroups.from_grid(**layout)
    recorder = FlightRecorder(7, True, groups)
    for number in (1, 2):  # the second step must not see the first one's
        recording, _ = step(recorder, groups, old_pass)
        if groups.rank == 0:
            TokenWriter(Path(folder), str, number - 1).write(number, recording)
    return recording.columns


@pytest.mark.parametrize("layout", [{"dp": 2}, {"dp": 2, "pp": 2}, {"tp": 2, "pp": 2}], ids=str)
@pytest.mark.parametrize("old_pass", [True, False])
def test_every_value_lands_at_its_own_token(tmp_path, layout, old_pass):
    ranks = run_ranks(len(layout) * 2, on_rank, layout, old_pass, str(tmp_path))
    record, groups = read_record(tmp_path, 2), scored_groups()
    assert recorded_steps(tmp_path) == [1, 2]
    assert [row["sample"] for row in record.responses] == [0, 0, 0, 0, 1, 1, 1]
    for columns in ranks:
        assert columns.keys() == record.columns.keys()
        assert all(columns[name].equal(record.columns[name]) for name in columns)
    for row in record.responses:
        place = int(row["prompt_id"].removeprefix("prompt/"))
        prompt, rollout = groups[place].prompt, groups[place].rollouts[row["sample"]]
        response, length = place * RESPONSES + row["sample"], len(rollout.response_ids)
        assert record.texts[row["start"] : row["stop"]] == [f"[{token}]" for token in rollout.response_ids]
        position = torch.arange(length) + len(prompt.token_ids) - 1

        def named(column: int, response: int = response, position: torch.Tensor = position) -> torch.Tensor:
            return ((response * 64 + position) * 16 + column).float() / 2**15

        found = {name: record.columns[name][row["start"] : row["stop"]] for name in record.columns}
        if response == UNJUDGED:
            assert not any(column.any() for name, column in found.items() if name != "method/amount")
            continue
        expected = {"log_prob": 1, "entropy": 2, "advantage": 3, "method/amount": 5, "rank": 8}
        for name, column in expected.items():
            assert found[name].equal(named(column)), name
        assert torch.allclose(found["rollout_log_prob"], torch.tensor(rollout.rollout_log_probs), atol=0, rtol=1e-7)
        assert found["value"].equal(named(4) + 1) and found["value_std"].equal(torch.ones(length))
        assert torch.allclose(found["kept_mass"], (-named(6)).exp()) and found["kept"].equal(position % 2 == 0)
        assert torch.allclose(found["ratio"], named(10).exp(), rtol=1e-5)
        assert found["clipped"].equal(position % 3 == 0) and found["clipped"].dtype == torch.bool
        assert found["method/selected"].equal(named(9) * 2**11 % 2 == 1)


def test_a_step_in_which_only_the_critic_learns_is_recorded_without_a_loss(tmp_path):
    recording, _ = one_rank(3, learns=False)
    assert {"log_prob", "advantage", "value_std", "method/amount", "kept"} <= recording.columns.keys()
    assert not {"ratio", "clipped"} & recording.columns.keys()
    assert recording.columns["log_prob"].any()


def test_a_step_holds_nothing_of_the_one_before() -> None:
    recorder, groups = FlightRecorder(3, True, ParallelGroups.single()), ParallelGroups.single()
    step(recorder, groups, old_pass=True)
    again, _ = step(recorder, groups, old_pass=True, learns=False)  # no loss: no ratio, nothing clipped
    fresh, _ = one_rank(3, learns=False)
    assert again.columns.keys() == fresh.columns.keys()
    assert all(torch.equal(again.columns[name], fresh.columns[name]) for name in fresh.columns)


def test_without_a_threshold_nothing_is_kept_or_filtered() -> None:
    """As in a run without Lp-Reg, or where its proxy is the engine's: "kept" would be true everywhere."""
    columns = one_rank(3, thresholded=False)[0].columns
    assert columns.keys() == one_rank(3)[0].columns.keys() - {"kept", "kept_mass"} and "rank" in columns


def test_recording_nothing_leaves_no_trace(tmp_path):
    recording, _ = one_rank(0)
    TokenWriter(tmp_path, str).write(1, recording)
    assert recording.columns == {} and list(tmp_path.iterdir()) == []


def test_the_size_of_a_file_is_bounded(tmp_path, monkeypatch):
    """A long response is recorded as far as its share of MOST_TOKENS goes."""
    monkeypatch.setattr("megatron_rlvr.recorder.MOST_TOKENS", 9)
    recording, _ = one_rank(3)
    TokenWriter(tmp_path, str).write(5, recording)
    record = read_record(tmp_path, 5)
    assert MOST_TOKENS == 32_768 and len(record.texts) <= 9
    for row in record.responses:
        assert row["stop"] - row["start"] == min(3, row["tokens"])
    columns = len(record.columns)
    texts = len(json.dumps([record.responses, record.texts]))
    assert record_path(tmp_path, 5).stat().st_size <= 9 * (4 * columns + 4) + 2 * texts + 150 * columns + 500


def test_a_resumed_run_drops_what_came_after(tmp_path):
    recording, _ = one_rank(1)
    writer = TokenWriter(tmp_path, str)
    for number in (1, 2, 3):
        writer.write(number, recording)
    for number in (1, 2):
        page_path(tmp_path, number).write_text("a page")
    (tmp_path / "tokens/step_4.new").write_text("what a kill left of a file")
    TokenWriter(tmp_path, str, resume_step=1)
    assert recorded_steps(tmp_path) == [1]
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == ["step_1.html", "step_1.safetensors"]


def test_errors_name_the_file_and_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"step_4\.safetensors does not exist: it holds none"):
        read_record(tmp_path, 4)
    recording, _ = one_rank(1)
    TokenWriter(tmp_path, str).write(3, recording)
    with pytest.raises(FileNotFoundError, match="it holds 1 steps from 3 to 3"):
        read_record(tmp_path, 4)
    record_path(tmp_path, 4).write_bytes(record_path(tmp_path, 3).read_bytes()[:40])
    with pytest.raises(ValueError, match=r"step_4\.safetensors is no record of tokens"):
        read_record(tmp_path, 4)
