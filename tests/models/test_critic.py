"""The critic's values, loss and gradients are those of one fp64 process, however the work is cut."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rlvr import platform
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.losses import clipped_value_loss
from megatron_rlvr.models.critic import HEAD, Critic, ValueHead
from megatron_rlvr.types import Batch, Microbatch
from tests.models import reference
from tests.models.conftest import Case
from tests.models.layouts import EVERYTHING, LAYOUTS, STILL, Layout, distance, gradients, make_batch, megatron
from tests.ranks import run_ranks
from tests.tiny import make_config

HEADS = {"qwen3-tied": 4, "qwen2-untied": 1}  # by model
SIZES = (28, EVERYTHING)  # tokens per microbatch: a response or two, and all of them
CLIP = 0.2

VALUE = 2e-5  # absolute, of values of order 1
LOSS = 2e-6
GRADIENT = 3e-5  # of the tensor's largest entry
NORM = 1e-5  # relative


@dataclass(frozen=True)
class Expected:
    """A critic's update, by response id: what it is given, and what transformers makes of it in fp64."""

    weight: Tensor  # [K, h] of the head
    bias: Tensor  # [K]
    old_values: dict[int, Tensor]  # [Lr, K]
    returns: dict[int, Tensor]  # [Lr]
    learns: dict[int, Tensor]  # [Lr, K] bool
    values: dict[int, Tensor]  # [Lr, K]
    loss: float
    gradients: dict[str, Tensor]
    norm: float

    @property
    def count(self) -> int:
        return sum(int(mask.sum()) for mask in self.learns.values())


def _expect(case: Case, heads: int) -> Expected:
    """Old values near the current ones, so that some are clipped and some are not; heads learn from half the tokens."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    model, size = reference.load(case.folder), 64
    weight, bias = draw(heads, size) / size**0.5, draw(heads)
    head = torch.nn.Linear(size, heads, dtype=torch.float64)
    head.load_state_dict({"weight": weight, "bias": bias})
    values, old, returns, learns = {}, {}, {}, {}
    for index, sample in case.samples.items():
        tokens = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        hidden = model.model(tokens).last_hidden_state[0, len(sample.prompt_ids) - 1 : -1]
        values[index] = head(hidden)
        old[index] = values[index].detach().float() + 0.3 * draw(*values[index].shape)
        # half a unit more, or the gradient of the bias would be the rounding of a sum that cancels
        returns[index] = values[index].detach().float().mean(1) + draw(len(values[index])) + 0.5
        learns[index] = torch.rand(values[index].shape, generator=generator) < 0.5
    total, moved = torch.zeros((), dtype=torch.float64), []
    for index, value in values.items():
        near = old[index] + (value - old[index]).clamp(-CLIP, CLIP)
        target = returns[index][:, None]
        total = total + (0.5 * torch.maximum((value - target) ** 2, (near - target) ** 2))[learns[index]].sum()
        moved.append(((near - target) ** 2 > (value - target) ** 2)[learns[index]])
    assert 0.1 < torch.cat(moved).float().mean() < 0.9  # the clip acts on some
    (loss := total / sum(mask.sum() for mask in learns.values())).backward()
    found = {name: item.grad for name, item in model.model.named_parameters(prefix="model")}
    found |= {f"{HEAD}.weight": head.weight.grad, f"{HEAD}.bias": head.bias.grad}
    norm = float(torch.stack([gradient.norm() for gradient in found.values()]).norm())
    values = {index: value.detach() for index, value in values.items()}
    return Expected(weight, bias, old, returns, learns, values, float(loss.detach()), found, norm)


@pytest.fixture(scope="module")
def expected(cases: dict[str, Case]) -> dict[str, Expected]:
    return {name: _expect(cases[name], heads) for name, heads in HEADS.items()}


def _make_critic(case: Case, layout: Layout, groups: ParallelGroups, heads: int, **critic: Any) -> Critic:
    sections = {"parallel": vars(layout), "critic": {"num_heads": heads, "optimizer": STILL} | critic}
    return Critic(make_config(case.folder, sections), groups)


def _fill(batch: Batch, wanted: Expected) -> None:
    shape = (batch.num_tokens, wanted.bias.numel())
    batch.values, batch.value_weights = torch.zeros(shape), torch.zeros(shape)
    batch.returns = torch.zeros(batch.num_tokens)
    for place, identity in enumerate(batch.response_ids.tolist()):
        if identity in wanted.values:
            mask = batch.loss_mask & (batch.response_index == place)
            batch.values[mask], batch.returns[mask] = wanted.old_values[identity], wanted.returns[identity]
            batch.value_weights[mask] = wanted.learns[identity] / wanted.count


def _loss(micro: Microbatch, values: Tensor) -> Tensor:
    return (micro.value_weights * clipped_value_loss(values, micro.values, micro.returns, CLIP)).sum()


def _measure(layout: Layout, cases: dict[str, Case], expected: dict[str, Expected]) -> list[dict[str, Any]]:
    with megatron(layout) as groups:
        return [
            {"model": name, "first head": first} | _measure_one(critic, cases[name], expected[name], layout, tokens)
            for name, heads in HEADS.items()
            for critic in [_make_critic(cases[name], layout, groups, heads)]
            for first in [_head(critic)]
            for tokens in SIZES
        ]


def _head(critic: Critic) -> Any:
    """The head's weights as they are now, on the last stage."""
    return critic.chunks[-1].output_layer.weight.detach().cpu().clone().numpy() if critic.groups.is_last_stage else None


def _measure_one(critic: Critic, case: Case, wanted: Expected, layout: Layout, tokens: int) -> dict[str, Any]:
    if critic.groups.is_last_stage:
        head = critic.chunks[-1].output_layer
        head.weight.data.copy_(wanted.weight)
        head.bias.data.copy_(wanted.bias)
    batch = make_batch(case.groups, case.samples, layout, critic.groups, tokens)
    critic.fill_values(batch)
    batch = batch.to(torch.device("cpu"))
    gap = float(batch.values[~batch.loss_mask].abs().max())
    for place, identity in enumerate(batch.response_ids.tolist()):
        if identity in wanted.values:
            mask = batch.loss_mask & (batch.response_index == place)
            gap = max(gap, float((batch.values[mask] - wanted.values[identity]).abs().max()))
    _fill(batch, wanted)
    metrics = critic.update(batch.to(platform.device()), batch.updates[0], _loss).means()
    found = {name: gradient.cpu() for name, gradient in gradients(critic).items()}
    head_gap = max(
        [0.0]
        + [
            float((found.pop(name) - wanted.gradients[name]).abs().max() / wanted.gradients[name].abs().max())
            for name in (f"{HEAD}.weight", f"{HEAD}.bias")
            if name in found
        ]
    )
    trunk_gap, worst = distance(critic, found, wanted.gradients)
    return {
        "microbatches": len(batch.updates[0].microbatches),
        "value": gap,
        "loss": abs(metrics["critic/loss"] - wanted.loss),
        "norm": abs(metrics["critic/grad_norm"] / wanted.norm - 1),
        "head": head_gap,
        "trunk": trunk_gap,
        "worst": worst,
    }


def _draw_head(heads: int, spread: float = 0.1, seed: int = 0) -> Any:
    shape: Any = SimpleNamespace(hidden_size=64, params_dtype=torch.float32, sequence_parallel=False)
    return ValueHead(shape, heads, spread, seed).weight.detach().numpy()


def test_heads_start_small_and_different() -> None:
    weight = _draw_head(16)
    assert len({tuple(row) for row in weight.tolist()}) == 16
    assert weight.std() * 64**0.5 == pytest.approx(0.1, rel=0.1)
    assert (_draw_head(16, spread=0.2) == 2 * weight).all() and (_draw_head(16, seed=1) != weight).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_loss_and_gradients_equal_one_fp64_process(
    layout: Layout, cases: dict[str, Case], expected: dict[str, Expected]
) -> None:
    chosen = {name: cases[name] for name in HEADS}
    ranks = run_ranks(layout.ranks, _measure, layout, chosen, expected, timeout=100)
    measured = [figures for rank in ranks for figures in rank]
    assert len({figures["microbatches"] for figures in measured}) == len(SIZES)
    drawn = {name: _draw_head(heads) for name, heads in HEADS.items()}
    for figures in measured:
        assert figures["value"] < VALUE, figures
        assert figures["loss"] < LOSS, figures
        assert figures["norm"] < NORM, figures
        assert figures["head"] < GRADIENT and figures["trunk"] < GRADIENT, figures
        assert figures["first head"] is None or (figures["first head"] == drawn[figures["model"]]).all()
    keys = ("value", "loss", "norm", "head", "trunk")
    print(f"\n{layout}: " + ", ".join(f"{key} {max(figures[key] for figures in measured):.1e}" for key in keys))
