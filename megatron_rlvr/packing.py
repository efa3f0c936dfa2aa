"""Responses -> this rank's packed batch: balanced over data-parallel ranks, cut into microbatches, shifted once.

Every rank sees every rollout of the step, so each works out the same plan and no rank has to be told its share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rlvr.types import Batch, Rollout, RolloutGroup, Update


@dataclass(frozen=True)
class _Response:
    index: int  # place in the step: prompt index * G + sample index
    prompt_ids: tuple[int, ...]
    rollout: Rollout
    reward: float | None

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.rollout.response_ids)

    @property
    def loss_tokens(self) -> int:
        return 0 if self.reward is None else len(self.rollout.response_ids)


def pack(
    groups: list[RolloutGroup],
    rewards: list[list[float | None]],
    *,
    updates: int,
    microbatch_tokens: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    microbatch_multiple: int = 1,
) -> Batch:
    """P groups of G rollouts -> the Batch of one data-parallel rank.

    rewards: [P][G]; None where no verifier could judge: such a response is in no loss and in no count. Update k takes
    groups k*P/updates .. (k+1)*P/updates, whatever the number of ranks; inside an update responses are dealt out so
    that ranks hold equally many and about as many tokens, then packed, longest first, into microbatches of at most
    ``microbatch_tokens``. Every rank gets the same number of microbatches, a multiple of ``microbatch_multiple``
    (interleaved pipelines want the number of stages). Raises ValueError when an update has too few responses for that,
    which cannot be where ranks * microbatch_multiple divides its number of responses.
    """
    if len(groups) % updates:
        raise ValueError(f"{len(groups)} groups do not divide into {updates} updates")
    size = len(groups[0].rollouts)
    per_update = len(groups) // updates
    ordered: list[_Response] = []
    plan: list[Update] = []
    for update in range(updates):
        members = [
            _Response(row * size + column, groups[row].prompt.token_ids, rollout, rewards[row][column])
            for row in range(update * per_update, (update + 1) * per_update)
            for column, rollout in enumerate(groups[row].rollouts)
        ]
        shares = _balance(members, dp_size)
        bins = _pack_equally(shares, microbatch_tokens, microbatch_multiple)[dp_rank]
        bounds = []
        for content in bins:
            bounds.append((len(ordered), len(ordered) + len(content)))
            ordered.extend(content)
        plan.append(
            Update(
                microbatches=tuple(bounds),
                num_tokens=sum(member.loss_tokens for member in members),
                num_responses=sum(member.reward is not None for member in members),
            )
        )
    return _build(ordered, tuple(plan), len(groups) * size, size)


def _balance(responses: list[_Response], ranks: int) -> list[list[_Response]]:
    """Rounds of one response per rank, longest first; in a round the longest goes to the rank with the fewest tokens.

    Loads differ by less than the longest response. Equal numbers matter as much: where each response fills a microbatch
    of its own, a rank with fewer responses could not fill as many microbatches as the others.
    """
    shares: list[list[_Response]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    ordered = sorted(responses, key=lambda item: (-item.length, item.index))
    for start in range(0, len(ordered), ranks):
        emptiest = sorted(range(ranks), key=lambda rank: (loads[rank], rank))
        for rank, response in zip(emptiest, ordered[start : start + ranks], strict=False):
            shares[rank].append(response)
            loads[rank] += response.length
    return shares


def _pack_equally(shares: list[list[_Response]], most_tokens: int, multiple: int) -> list[list[list[_Response]]]:
    """Per rank a list of bins; the same number of bins on every rank."""
    packed = [_first_fit(share, most_tokens) for share in shares]
    count = max(len(bins) for bins in packed)
    count += -count % multiple
    for bins in packed:
        while len(bins) < count:
            largest = max((content for content in bins if len(content) > 1), key=len, default=None)
            if largest is None:
                raise ValueError(
                    f"an update's share of {sum(map(len, bins))} responses cannot fill {count} microbatches: "
                    f"raise rollout.prompts_per_step or lower trainer.updates_per_rollout, parallel.dp or parallel.vpp"
                )
            half = len(largest) // 2
            bins.append(largest[half:])
            del largest[half:]
    return packed


def _first_fit(responses: list[_Response], most_tokens: int) -> list[list[_Response]]:
    bins: list[list[_Response]] = []
    room: list[int] = []
    for response in responses:
        for index, left in enumerate(room):
            if response.length <= left:
                bins[index].append(response)
                room[index] -= response.length
                break
        else:
            bins.append([response])
            room.append(most_tokens - response.length)
    return bins


def _build(responses: list[_Response], updates: tuple[Update, ...], num_step_responses: int, size: int) -> Batch:
    token_ids: list[int] = []
    position_ids: list[int] = []
    target_ids: list[int] = []
    loss_mask: list[bool] = []
    log_probs: list[float] = []
    extras: dict[str, list[float]] = {name: [] for response in responses[:1] for name in response.rollout.extras}
    starts = [0]
    for response in responses:
        sequence = [*response.prompt_ids, *response.rollout.response_ids]
        before, after = len(response.prompt_ids) - 1, len(response.rollout.response_ids)
        token_ids += sequence
        position_ids += range(len(sequence))
        # The shift to the predicted token: the last prompt token predicts the first response token, and the last
        # response token predicts nothing.
        target_ids += [*sequence[1:], 0]
        loss_mask += [False] * before + [response.reward is not None] * after + [False]
        log_probs += [0.0] * before + response.rollout.rollout_log_probs + [0.0]
        for name, values in response.rollout.extras.items():
            extras[name] += [0.0] * before + values + [0.0]
        starts.append(len(token_ids))
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    return Batch(
        token_ids=torch.tensor(token_ids),
        target_ids=torch.tensor(target_ids),
        position_ids=torch.tensor(position_ids),
        loss_mask=torch.tensor(loss_mask),
        response_index=torch.repeat_interleave(torch.arange(len(responses)), lengths),
        rollout_log_probs=torch.tensor(log_probs, dtype=torch.float32),
        cu_seqlens=cu_seqlens,
        response_ids=torch.tensor([response.index for response in responses]),
        rewards=torch.tensor([response.reward or 0.0 for response in responses], dtype=torch.float32),
        response_lengths=torch.tensor([response.loss_tokens for response in responses]),
        extras={name: torch.tensor(values, dtype=torch.float32) for name, values in extras.items()},
        updates=updates,
        num_step_responses=num_step_responses,
        group_size=size,
    )
