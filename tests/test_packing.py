"""Packing keeps every response, every alignment and every count, for any number of ranks, updates and any budget."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.packing import pack
from megatron_rlvr.types import Batch, Microbatch, NotFilledError, Prompt, Rollout, RolloutGroup


@dataclass(frozen=True)
class Plan:
    """A drawn step; ``dp * multiple`` divides the responses of an update, so packing must succeed."""

    groups: list[RolloutGroup]
    rewards: list[list[float | None]]
    updates: int
    dp: int
    multiple: int
    budget: int

    def batches(self) -> list[Batch]:
        return [self.batch(rank) for rank in range(self.dp)]

    def batch(self, rank: int) -> Batch:
        return pack(
            self.groups,
            self.rewards,
            updates=self.updates,
            microbatch_tokens=self.budget,
            dp_rank=rank,
            dp_size=self.dp,
            microbatch_multiple=self.multiple,
        )

    @property
    def size(self) -> int:
        return len(self.groups[0].rollouts)

    def response(self, identity: int) -> tuple[Prompt, Rollout, float | None]:
        row, column = divmod(identity, self.size)
        return self.groups[row].prompt, self.groups[row].rollouts[column], self.rewards[row][column]

    def of_update(self, update: int) -> range:
        per_update = len(self.groups) // self.updates * self.size
        return range(update * per_update, (update + 1) * per_update)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    dp, multiple, updates = (draw(st.integers(1, most)) for most in (3, 2, 3))
    size = dp * multiple * draw(st.integers(1, 2))
    rows = updates * draw(st.integers(1, 2))
    token = iter(range(1, 100_000))  # every token is another, so that a wrong alignment cannot hide
    groups, rewards, longest = [], [], 0
    for row in range(rows):
        prompt = Prompt(f"p/{row}", "", tuple(next(token) for _ in range(draw(st.integers(1, 6)))), "toy", None)
        lengths = draw(st.lists(st.integers(1, 12), min_size=size, max_size=size))
        rollouts = []
        for index, length in enumerate(lengths):
            ids = [next(token) for _ in range(length)]
            rollouts.append(Rollout(index, ids, [-0.001 * value for value in ids], "stop", 0))
        groups.append(RolloutGroup(prompt, rollouts))
        rewards.append(draw(st.lists(st.sampled_from([None, 0.0, 0.5, 1.0]), min_size=size, max_size=size)))
        longest = max(longest, len(prompt.token_ids) + max(lengths))
    return Plan(groups, rewards, updates, dp, multiple, longest + draw(st.integers(0, 40)))


@settings(max_examples=30, deadline=None)
@given(plans())
def test_every_response_once_and_whole_groups_per_update(plan: Plan) -> None:
    batches = plan.batches()
    for update in range(plan.updates):
        held = []
        for batch in batches:
            bounds = batch.updates[update].microbatches
            held += batch.response_ids[bounds[0][0] : bounds[-1][1]].tolist()
        assert sorted(held) == list(plan.of_update(update))
    assert sum(batch.num_responses for batch in batches) == len(plan.groups) * plan.size
    assert {(batch.num_step_responses, batch.group_size) for batch in batches} == {
        (len(plan.groups) * plan.size, plan.size)
    }


@settings(max_examples=30, deadline=None)
@given(plans())
def test_microbatches_keep_to_the_budget_and_are_as_many_on_every_rank(plan: Plan) -> None:
    batches = plan.batches()
    for batch in batches:
        end = 0
        for bounds in (bounds for update in batch.updates for bounds in update.microbatches):
            assert bounds[0] == end < bounds[1]  # contiguous, none empty
            end = bounds[1]
            assert batch.microbatch(*bounds).num_tokens <= plan.budget
        assert end == batch.num_responses
    for update in range(plan.updates):
        (count,) = {len(batch.updates[update].microbatches) for batch in batches}
        assert count % plan.multiple == 0


@settings(max_examples=30, deadline=None)
@given(plans())
def test_ranks_hold_equally_many_responses_and_about_as_many_tokens(plan: Plan) -> None:
    loads: list[list[int]] = [[] for _ in range(plan.updates)]
    for batch in plan.batches():
        for update, load in zip(batch.updates, loads, strict=True):
            micros = [batch.microbatch(*bounds) for bounds in update.microbatches]
            assert sum(micro.num_responses for micro in micros) == len(plan.of_update(0)) // plan.dp
            load.append(sum(micro.num_tokens for micro in micros))
    for update, load in enumerate(loads):
        lengths = [_length(plan, identity) for identity in plan.of_update(update)]
        assert max(load) - min(load) <= max(lengths) - min(lengths)


def test_the_next_longest_goes_to_the_rank_with_the_fewest_tokens_prompts_included() -> None:
    """Whether they are trained on or not: 10 + 1 and 9 + 5."""
    rewards = [[None], [1.0], [1.0], [1.0]]  # the first is computed, though it teaches nothing
    groups = [
        RolloutGroup(Prompt("p", "", (1,), "toy", None), [Rollout(0, [2] * size, [-0.1] * size, "stop", 0)])
        for size in (9, 8, 4, 1)
    ]
    plan = Plan(groups, rewards, updates=1, dp=2, multiple=1, budget=20)
    assert sorted(batch.response_ids.sort().values.tolist() for batch in plan.batches()) == [[0, 3], [1, 2]]


def _length(plan: Plan, identity: int) -> int:
    prompt, rollout, _ = plan.response(identity)
    return len(prompt.token_ids) + len(rollout.response_ids)


@settings(max_examples=30, deadline=None)
@given(plans())
def test_every_tensor_is_aligned_to_the_predicted_token(plan: Plan) -> None:
    for batch in plan.batches():
        for place, identity in enumerate(batch.response_ids.tolist()):
            prompt, rollout, reward = plan.response(identity)
            low, high = batch.cu_seqlens[place : place + 2].tolist()
            sequence = [*prompt.token_ids, *rollout.response_ids]
            assert batch.token_ids[low:high].tolist() == sequence
            assert batch.position_ids[low:high].tolist() == list(range(len(sequence)))
            assert batch.response_index[low:high].tolist() == [place] * len(sequence)
            assert batch.target_ids[low:high].tolist() == [*sequence[1:], 0]
            predicts_response = [False] * (len(prompt.token_ids) - 1) + [True] * len(rollout.response_ids) + [False]
            scored = reward is not None
            assert batch.loss_mask[low:high].tolist() == [here and scored for here in predicts_response]
            here = torch.tensor(predicts_response)
            assert batch.target_ids[low:high][here].tolist() == rollout.response_ids
            assert batch.rollout_log_probs[low:high][here].tolist() == pytest.approx(rollout.rollout_log_probs)
            assert not batch.rollout_log_probs[low:high][~here].any()
            assert float(batch.rewards[place]) == (reward or 0.0)
            assert int(batch.response_lengths[place]) == (len(rollout.response_ids) if scored else 0)


@settings(max_examples=30, deadline=None)
@given(plans())
def test_counts_are_global_and_leave_out_what_was_not_scored(plan: Plan) -> None:
    batches = plan.batches()
    for update in range(plan.updates):
        scored = [plan.response(identity) for identity in plan.of_update(update)]
        scored = [rollout for _, rollout, reward in scored if reward is not None]
        micros = [batch.microbatch(*bounds) for batch in batches for bounds in batch.updates[update].microbatches]
        for batch in batches:
            assert batch.updates[update].num_responses == len(scored)
            assert batch.updates[update].num_tokens == sum(len(rollout.response_ids) for rollout in scored)
        assert sum(int(micro.loss_mask.sum()) for micro in micros) == batches[0].updates[update].num_tokens
        assert sum(int(micro.response_lengths.sum()) for micro in micros) == batches[0].updates[update].num_tokens


PER_TOKEN = ("token_ids", "target_ids", "position_ids", "loss_mask", "rollout_log_probs", "old_log_probs")
PER_TOKEN += ("old_top_ids", "old_top_log_probs")
PER_RESPONSE = ("response_ids", "rewards", "response_lengths")


@settings(max_examples=30, deadline=None)
@given(plans())
def test_microbatches_are_slices_of_the_batch(plan: Plan) -> None:
    batch = plan.batch(plan.dp - 1)
    batch.old_log_probs = torch.randn(batch.num_tokens)
    batch.old_top_ids = torch.randint(99, (batch.num_tokens, 3))
    batch.old_top_log_probs = torch.randn(batch.num_tokens, 3)
    batch.extras = {"lp_reg/proxy_log_prob": torch.randn(batch.num_tokens)}
    micros = batch.microbatches()
    for name in PER_TOKEN + PER_RESPONSE:
        assert torch.cat([getattr(micro, name) for micro in micros]).equal(getattr(batch, name)), name
    extras = [micro.extras["lp_reg/proxy_log_prob"] for micro in micros]
    assert torch.cat(extras).equal(batch.extras["lp_reg/proxy_log_prob"])
    for micro in micros:
        assert type(micro) is Microbatch
        assert micro.cu_seqlens[0] == 0 and micro.cu_seqlens[-1] == micro.num_tokens
        assert micro.cu_seqlens.dtype == torch.int32
        lengths = (micro.cu_seqlens[1:] - micro.cu_seqlens[:-1]).tolist()
        assert lengths == [_length(plan, identity) for identity in micro.response_ids.tolist()]
        wanted = torch.repeat_interleave(torch.arange(micro.num_responses), torch.tensor(lengths))
        assert micro.response_index.equal(wanted)
        assert micro.per_token(micro.rewards).equal(micro.rewards[wanted])
        sums = micro.per_response_sum(torch.ones(micro.num_tokens))
        assert sums.tolist() == micro.response_lengths.tolist()
        with pytest.raises(NotFilledError, match="advantages is not filled yet"):
            _ = micro.advantages


def test_two_responses_by_hand() -> None:
    prompt = Prompt("p", "", (5, 6), "toy", None)
    group = RolloutGroup(prompt, [Rollout(0, [7, 1], [-0.5, -0.25], "stop", 0), Rollout(1, [8], [-1.0], "length", 0)])
    for rollout, noted in zip(group.rollouts, ([-3.0, -4.0], [-5.0]), strict=True):
        rollout.extras = {"method/noted": noted}
    batch = pack([group], [[1.0, None]], updates=1, microbatch_tokens=7)
    wanted = dict(
        token_ids=[5, 6, 7, 1, 5, 6, 8],
        target_ids=[6, 7, 1, 0, 6, 8, 0],
        position_ids=[0, 1, 2, 3, 0, 1, 2],
        loss_mask=[False, True, True, False, False, False, False],
        rollout_log_probs=[0.0, -0.5, -0.25, 0.0, 0.0, -1.0, 0.0],
        cu_seqlens=[0, 4, 7],
        response_lengths=[2, 0],
    )
    assert {name: getattr(batch, name).tolist() for name in wanted} == wanted
    assert {name: row.tolist() for name, row in batch.extras.items()} == {"method/noted": [0, -3, -4, 0, 0, -5, 0]}
    (update,) = batch.updates
    assert dataclasses.astuple(update) == (((0, 2),), 2, 1)


def _singles(lengths: list[int]) -> list[RolloutGroup]:
    """Groups of one response, so many tokens long with its prompt of one token."""
    return [
        RolloutGroup(Prompt("p", "", (1,), "toy", None), [Rollout(0, [2] * (n - 1), [-1.0] * (n - 1), "stop", 0)])
        for n in lengths
    ]


def test_ranks_hold_equal_numbers_where_few_responses_fill_a_microbatch() -> None:
    """Dealt out by tokens alone, [9] and [5, 3, 3] would want one microbatch and two."""
    batches = [
        pack(_singles([3, 3, 5, 9]), [[1.0]] * 4, updates=1, microbatch_tokens=10, dp_rank=rank, dp_size=2)
        for rank in range(2)
    ]
    assert [batch.response_ids.tolist() for batch in batches] == [[3, 1], [2, 0]]
    assert [len(batch.updates[0].microbatches) for batch in batches] == [2, 2]


def test_what_cannot_be_packed_says_why() -> None:
    with pytest.raises(ValueError, match="3 groups do not divide into 2 updates"):
        pack(_singles([3, 3, 3]), [[1.0]] * 3, updates=2, microbatch_tokens=10)
    with pytest.raises(ValueError, match="0 responses cannot fill 1 microbatches: raise rollout.prompts_per_step"):
        pack(_singles([3]), [[1.0]], updates=1, microbatch_tokens=10, dp_rank=0, dp_size=2)
