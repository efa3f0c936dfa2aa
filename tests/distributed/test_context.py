"""Stretches of tokens, their gathering, the exchange of tokens for heads: values and gradients, on 2 and 3 ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr.distributed import context
from megatron_rlvr.distributed.vocab import DETACHED, TokenStatistics, token_statistics
from tests.ranks import run_ranks

RANKS = [2, 3]


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_without_a_group_everything_stays_as_it_is() -> None:
    tokens = torch.arange(5)
    assert context.stretch(tokens, 4, None) is tokens
    assert context.gather(tokens, 3, None).tolist() == [0, 1, 2]
    statistics = token_statistics(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    assert context.gather_statistics(statistics, 2, None) is statistics


def _stretches() -> None:
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    for count, multiple in ((12, 1), (7, 1), (7, 2), (1, 4)):
        for tokens, fill in ((torch.arange(count), -1), (_draw(count, 3), -torch.inf)):
            own = context.stretch(tokens, multiple, group, fill=fill)
            assert len(own) % multiple == 0 and len(own) * size - count < size * multiple
            assert context.gather(own, count, group).equal(tokens)
            padding = context.gather(own, len(own) * size, group)[count:]
            assert (padding == fill).all()
            if rank == 0:
                assert own[: min(len(own), count)].equal(tokens[: len(own)])


@pytest.mark.parametrize("ranks", RANKS)
def test_stretches_cover_the_tokens_in_order(ranks: int) -> None:
    run_ranks(ranks, _stretches, timeout=30)


def _gather_gradient() -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    whole, weight = _draw(7, 2), _draw(7)
    own = context.stretch(whole, 1, group).requires_grad_()
    (context.gather(own, 7, group).square().sum(1) * weight).sum().backward()
    gathered = context.gather(own.grad, 7, group)
    torch.testing.assert_close(gathered, 2 * whole * weight[:, None], rtol=0, atol=0)
    assert rank + 1 < dist.get_world_size() or not own.grad[-1].any()  # padding that nobody read


@pytest.mark.parametrize("ranks", RANKS)
def test_a_stretch_has_the_gradient_of_its_own_tokens(ranks: int) -> None:
    run_ranks(ranks, _gather_gradient, timeout=30)


def _statistics() -> None:
    group, count = dist.group.WORLD, 7
    logits, targets = _draw(count, 11).float(), torch.arange(count)
    upstream = _draw(4, count).float()

    def use(found: TokenStatistics) -> Tensor:
        assert found.old_kl is not None
        return (torch.stack([found.log_prob, found.entropy, found.log_kept_mass, found.old_kl]) * upstream).sum()

    def old(ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        return context.stretch(ids, 1, group, fill=-1), context.stretch(log_probs, 1, group, fill=-torch.inf)

    whole = logits.clone().requires_grad_()
    kept = token_statistics(logits * 0.7, targets, min_p=0.1, top=3)
    expected = token_statistics(whole, targets, min_p=0.1, top=3, old_top=(kept.top_ids, kept.top_log_probs))
    use(expected).backward()
    own = context.stretch(logits, 1, group).clone().requires_grad_()
    own_targets, own_top = context.stretch(targets, 1, group), old(kept.top_ids, kept.top_log_probs)
    part = token_statistics(own, own_targets, min_p=0.1, top=3, old_top=own_top)
    found = context.gather_statistics(part, count, group)
    use(found).backward()
    for name, value in vars(expected).items():
        got = getattr(found, name)
        assert got.equal(value) and got.dtype == value.dtype and got.is_contiguous(), name
        assert got.requires_grad == (name not in DETACHED), name
    assert own.grad.isfinite().all()
    assert context.gather(own.grad, count, group).equal(whole.grad)


@pytest.mark.parametrize("ranks", RANKS)
def test_statistics_of_stretches_are_those_of_the_whole_microbatch(ranks: int) -> None:
    run_ranks(ranks, _statistics, timeout=30)


def _exchange() -> None:
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    tokens, width = 4 * size, 5
    wholes = [_draw(tokens, heads * size, width) for heads in (2, 1)]
    upstream = _draw(tokens, 2 * size, width)
    own = [context.stretch(whole, 1, group).clone().requires_grad_() for whole in wholes]
    parts = context.to_heads(own, group)
    for part, whole in zip(parts, wholes, strict=True):
        assert part.equal(whole.chunk(size, dim=1)[rank])
    back = context.to_tokens(parts[0] * 3 + parts[1].repeat_interleave(2, dim=1), group)
    queries, keys = own
    assert back.equal(queries * 3 + keys.repeat_interleave(2, dim=1))
    (back * context.stretch(upstream, 1, group)).sum().backward()
    mine = context.stretch(upstream, 1, group)
    assert queries.grad.equal(3 * mine)
    torch.testing.assert_close(keys.grad, mine.unflatten(1, (-1, 2)).sum(2))


@pytest.mark.parametrize("ranks", RANKS)
def test_heads_for_tokens_and_back(ranks: int) -> None:
    run_ranks(ranks, _exchange, timeout=30)


def _repeats() -> list[int]:
    return [context.repeats(heads, dist.group.WORLD) for heads in (1, 2, 3, 4, 6)]


def test_key_value_heads_come_as_often_as_ranks_need_them() -> None:
    assert run_ranks(2, _repeats, timeout=30)[0] == [2, 1, 2, 1, 1]
    assert run_ranks(3, _repeats, timeout=30)[0] == [3, 3, 1, 3, 1]
