"""The flight recorder: what the step knew of a few responses, token by token, as it trained on them.

    recorder.start(batch, groups)                     chooses the step's responses
    recorder.old_policy(batch, old)                   rank, kept or filtered, kept mass: where its statistics are
    recorder.loss(micro, current, clipped)            ratio, clipped, and what the microbatch holds by then
    recording = recorder.collect(batch)               over the ranks, for the one that writes

Nothing is computed anew: every number is the one that the step used. No microbatch waits for the device, and a step
makes one collective of 4 bytes per token and column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlvr import losses
from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.vocab import TokenStatistics
from megatron_rlvr.metrics import spread
from megatron_rlvr.token_records import MOST_TOKENS, Recorded, Recording
from megatron_rlvr.types import Batch, Microbatch, RolloutGroup

ROW = "recorder/row"  # [t] extra: a token's place in the record; one place behind its end for the others


class FlightRecorder:
    """Follows ``count`` responses of each step, those that rollouts.jsonl takes if it holds as many; 0: none.

    Every rank calls every method. Columns, [n] each over the tokens of all chosen responses: log_prob,
    rollout_log_prob, entropy, rank, ratio, clipped, advantage, where a method has a threshold (Lp-Reg) kept and
    kept_mass, with a critic value and value_std, and under its own name every [t] tensor that an exploration method
    keeps (lp_reg/selected, cde/bonus). log_prob to rank and what is kept are the old policy's; ratio is the current
    one's over it, at the token's own update.
    """

    def __init__(self, count: int, thresholded: bool, groups: ParallelGroups) -> None:
        """``count`` responses of each step; ``thresholded``: whether some method has a kept set computed."""
        self._count, self._thresholded, self._groups = count, thresholded, groups
        self._chosen: list[Recorded] = []
        self._columns: dict[str, Tensor] = {}  # name -> [n + 1], this rank's tokens at their places
        self._flags: set[str] = set()  # the columns that are true or false

    def start(self, batch: Batch, groups: list[RolloutGroup]) -> None:
        """Choose the responses: evenly over the groups; of a long one the first MOST_TOKENS / count tokens."""
        self._chosen, self._columns, self._flags = [], {}, set()
        if not self._count:
            return
        start = 0
        for place, sample in spread([len(group.rollouts) for group in groups], self._count):
            rollout = groups[place].rollouts[sample]
            stop = start + min(len(rollout.response_ids), MOST_TOKENS // self._count)
            self._chosen.append(Recorded(groups[place].prompt, rollout, place * batch.group_size + sample, start, stop))
            start = stop
        batch.extras[ROW] = self._rows(batch)

    def old_policy(self, tokens: Microbatch, old: TokenStatistics) -> None:
        """The statistics of the policy that the ratio is taken against."""
        columns = {"rank": old.rank}
        if self._thresholded:
            columns |= {"kept": old.proxy_log_prob.isfinite(), "kept_mass": old.log_kept_mass.exp()}
        self._keep(tokens, columns)

    def loss(self, micro: Microbatch, current: TokenStatistics, clipped: Tensor) -> None:
        """What the loss of a microbatch was made of; call it when the exploration methods have had their turn."""
        ratio = losses.ratio(current.log_prob.detach(), micro.old_log_probs)
        self._keep(micro, self._of_batch(micro) | {"ratio": ratio, "clipped": clipped} | micro.extras)

    def collect(self, batch: Batch) -> Recording:
        """The step's columns, fp32 or bool on the CPU, on every rank.

        A response that no verifier could judge trains nothing: its tokens are 0 in every column.
        """
        groups, last = self._groups, self._groups.pp_size - 1
        if not self._chosen:
            return Recording([], {})
        if groups.is_last_stage and "log_prob" not in self._columns:  # only the critic learns: no loss was taken
            self._keep(batch, self._of_batch(batch) | batch.extras)
        names, flags = reduce.broadcast_object((list(self._columns), self._flags), last, groups.pp)
        mine = reduce.all_sum(torch.stack(list(self._columns.values())), groups.dp) if groups.is_last_stage else None
        shape = (len(names), self._chosen[-1].stop + 1)
        table = reduce.broadcast_from_last_stage(mine, shape, torch.float32, groups)
        rows = zip(names, table[:, :-1].cpu(), strict=True)
        return Recording(self._chosen, {name: row.bool() if name in flags else row.clone() for name, row in rows})

    def _of_batch(self, tokens: Microbatch) -> dict[str, Tensor]:
        columns = {
            "log_prob": tokens.old_log_probs,
            "rollout_log_prob": tokens.rollout_log_probs,
            "entropy": tokens.entropy,
            "advantage": tokens.advantages,
        }
        if tokens.has("values"):
            columns |= {"value": tokens.values.mean(dim=1), "value_std": tokens.values.std(dim=1, correction=0)}
        return columns

    def _keep(self, tokens: Microbatch, columns: dict[str, Tensor]) -> None:
        """Put each token's value at its place; tokens that are not recorded share the place behind the end."""
        if not self._chosen:
            return
        rows = tokens.extras[ROW]
        for name, values in columns.items():
            if name == ROW:
                continue
            if values.dtype == torch.bool:
                self._flags.add(name)
            if name not in self._columns:
                self._columns[name] = torch.zeros(self._chosen[-1].stop + 1, device=rows.device)
            self._columns[name][rows] = values.detach().float()

    def _rows(self, batch: Batch) -> Tensor:
        """[T] where each token goes."""
        rows = torch.full((batch.num_tokens,), self._chosen[-1].stop)
        bounds, lengths = batch.cu_seqlens.tolist(), batch.response_lengths.tolist()
        places = {identity: place for place, identity in enumerate(batch.response_ids.tolist())}
        for item in self._chosen:
            place = places.get(item.index)
            if place is not None and lengths[place]:
                # the last entry of a response predicts nothing, those of its tokens come right before it
                first = bounds[place + 1] - 1 - lengths[place]
                rows[first : first + item.stop - item.start] = torch.arange(item.start, item.stop)
        return rows.to(batch.token_ids.device)
