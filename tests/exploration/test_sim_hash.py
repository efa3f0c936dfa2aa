from __future__ import annotations

import math

import pytest
import torch

from megatron_rlvr.config import Config as RunConfig
from megatron_rlvr.config import ConfigError
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.exploration.base import Exploration, Needs, build
from megatron_rlvr.metrics import Meter
from tests.exploration.toy import make_batch
from tests.ranks import run_ranks

HIDDEN, RESPONSES = 6, 12


def method(**options) -> Exploration:
    return build({"sim_hash": {"bits": 2, "strength": 0.5} | options}, RunConfig(seed=3))


def states_of_step(step: int) -> torch.Tensor:
    return torch.randn(RESPONSES, HIDDEN, generator=torch.Generator().manual_seed(step))


def bonuses(sim_hash: Exploration, step: int, groups: ParallelGroups, share: slice) -> tuple[list[float], dict]:
    """What responses ``share`` of a step earn on the rank that holds them."""
    batch, meter = make_batch([1] * RESPONSES), Meter()
    batch = batch.microbatch(*share.indices(RESPONSES)[:2])
    batch.num_step_responses = RESPONSES  # type: ignore[attr-defined]  # a batch's, which the slice is here
    batch.states = states_of_step(step)[share]
    return sim_hash.shape_rewards(batch, groups, step, meter).tolist(), meter.means()


def test_the_bonus_is_the_inverse_root_of_how_often_a_code_has_come() -> None:
    sim_hash, everything = method(), slice(0, RESPONSES)
    (only,) = sim_hash.methods  # type: ignore[attr-defined]
    counts: dict[str, int] = {}
    for step in range(3):
        codes = ["".join(map(str, only.codes(state[None]).tolist())) for state in states_of_step(step)]
        for code in codes:
            counts[code] = counts.get(code, 0) + 1
        found, metrics = bonuses(sim_hash, step, ParallelGroups.single(), everything)
        assert found == pytest.approx([0.5 / math.sqrt(counts[code]) for code in codes])
        assert metrics["sim_hash/bonus"] == pytest.approx(sum(found) / RESPONSES)
        assert metrics["sim_hash/codes"] == len(counts) and 2 <= len(counts) <= 4
        assert metrics["sim_hash/largest_share"] == pytest.approx(max(counts.values()) / sum(counts.values()))


@pytest.mark.parametrize("projection", ["gaussian", "rademacher"])
def test_a_code_holds_the_sides_of_random_planes(projection: str) -> None:
    """Its bits by the signs that the planes' normals give, read off one unit vector after the other."""
    (only,) = method(bits=40, projection=projection).methods  # type: ignore[attr-defined]
    signs = [[code >> bit & 1 for bit in range(40)] for code in only.codes(torch.eye(HIDDEN)).tolist()]
    assert len({tuple(row) for row in signs}) == HIDDEN
    state = torch.tensor([[3.0, 0, 0, 0, 0, 0], [-3.0, 0, 0, 0, 0, 0]])
    above, below = only.codes(state).tolist()
    assert [above >> bit & 1 for bit in range(40)] == signs[0] and above ^ below == 2**40 - 1
    if projection == "rademacher":  # every entry weighs the same: the sign of the sum is that of the majority
        together = int(only.codes(torch.tensor([[1.0, 1.0, 1.0, 0, 0, 0]]))[0])
        assert [together >> bit & 1 for bit in range(40)] == [
            int(sum(column) >= 2) for column in zip(*signs[:3], strict=True)
        ]


def test_counts_are_those_of_all_ranks_and_of_the_run_before() -> None:
    def work(ranks: int) -> list:
        groups = ParallelGroups.from_grid(dp=2) if ranks == 2 else ParallelGroups.single()
        share = [slice(0, 5), slice(5, RESPONSES)][groups.dp_rank] if ranks == 2 else slice(0, RESPONSES)
        sim_hash, found = method(), []
        for step in range(3):
            if step == 2:  # stopped and resumed
                state, sim_hash = sim_hash.state_dict(), method()
                sim_hash.load_state_dict(state)
            found.append(bonuses(sim_hash, step, groups, share))
        return found

    whole, parts = work(1), run_ranks(2, work, 2, timeout=60)
    for step, (wanted, metrics) in enumerate(whole):
        assert parts[0][step][0] + parts[1][step][0] == pytest.approx(wanted)
        for part in parts:
            assert part[step][1]["sim_hash/largest_share"] == pytest.approx(metrics["sim_hash/largest_share"])


def test_counts_of_other_codes_are_not_carried_on(caplog: pytest.LogCaptureFixture) -> None:
    sim_hash, everything = method(), slice(0, RESPONSES)
    fresh, _ = bonuses(sim_hash, 0, ParallelGroups.single(), everything)
    for other in ({"bits": 3}, {"projection": "rademacher"}, {"state": "mean"}):
        resumed = method(**other)
        resumed.load_state_dict(sim_hash.state_dict())
        wanted = bonuses(method(**other), 0, ParallelGroups.single(), everything)
        assert bonuses(resumed, 0, ParallelGroups.single(), everything) == wanted
    state = sim_hash.state_dict()
    del state["sim_hash"]["codes_of"]  # as an earlier version wrote it
    method().load_state_dict(state)
    build({"sim_hash": {"bits": 2, "strength": 0.5}}, RunConfig(seed=4)).load_state_dict(sim_hash.state_dict())
    assert caplog.text.count("sim_hash counts from 0") == 5
    same = method()
    same.load_state_dict(sim_hash.state_dict())
    assert bonuses(same, 0, ParallelGroups.single(), everything)[0] == pytest.approx([x / 2**0.5 for x in fresh])


def test_what_it_needs_and_refuses() -> None:
    assert method(state="mean").needs() == Needs(states="mean")
    with pytest.raises(ConfigError, match="different states of a response"):
        Needs(states="mean").merge(Needs(states="last"))
    for options, message in [
        ({"bits": 0}, r"sim_hash.bits must be in 1..62, not 0"),
        ({"bits": 63}, r"sim_hash.bits must be in 1..62"),
        ({"strength": -1}, "sim_hash.strength must be at least 0"),
        ({"state": "first"}, "sim_hash.state must be one of 'last'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            method(**options)
