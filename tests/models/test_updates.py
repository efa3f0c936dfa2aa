"""Three optimizer updates equal torch's AdamW on the transformers model, in every layout, sharded optimizer or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import reference
from tests.models.conftest import Case
from tests.models.layouts import (
    LAYOUTS,
    Layout,
    distance,
    make_batch,
    make_policy,
    megatron,
    run_update,
    weights,
)
from tests.ranks import run_ranks

LEARNING_RATES = [1e-3, 2e-3, 2e-3 * 3 / 4]  # two updates of warm-up, then three of linear decay, zero after them
OPTIMIZER = {
    "lr": 2e-3,
    "warmup_steps": 2,
    "schedule": "linear",
    "weight_decay": 0.5,
    "betas": [0.9, 0.95],
    "eps": 1e-4,  # entries whose gradient is rounding would else move by a whole learning rate
    "clip_grad": 1.0,
}
UPDATES = 3
MODELS = ("qwen3-tied", "qwen2-untied")  # tied embeddings and query-key norms; biases and a head of its own

COVERED = [Layout(tp=2), Layout(pp=2)]  # by those that add sequence parallelism and virtual stages

NORM = 1e-4  # relative: from the second update on it carries the first one's rounding
WEIGHT = 2e-5  # of the tensor's largest entry


@dataclass(frozen=True)
class Expected:
    norms: list[float]
    losses: list[float]
    weights: dict[str, Tensor]


def _adamw(case: Case) -> Expected:
    """fp64; weight decay on matrices only; gradients clipped before the update."""
    model = reference.load(case.folder)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [item for item in parameters.values() if item.dim() > 1],
                "weight_decay": OPTIMIZER["weight_decay"],
            },
            {"params": [item for item in parameters.values() if item.dim() == 1], "weight_decay": 0.0},
        ],
        betas=tuple(OPTIMIZER["betas"]),
        eps=OPTIMIZER["eps"],
    )
    norms, losses = [], []
    share = len(case.groups) * 2 // UPDATES
    for number, rate in enumerate(LEARNING_RATES):
        batch = [case.samples[i] for i in range(number * share, (number + 1) * share) if i in case.samples]
        optimizer.zero_grad()
        loss = reference.loss(model, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), OPTIMIZER["clip_grad"])))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return Expected(norms, losses, {name: item.detach() for name, item in parameters.items()})


@pytest.fixture(scope="module")
def expected(cases: dict[str, Case]) -> dict[str, Expected]:
    return {name: _adamw(cases[name]) for name in MODELS}


def _train(layout: Layout, cases: dict[str, Case], expected: dict[str, Expected]) -> list[dict[str, Any]]:
    with megatron(layout) as ranks:
        return [
            _train_one(layout, ranks, cases[name], expected[name], sharded)
            for name in MODELS
            for sharded in (True, False)
        ]


def _train_one(layout: Layout, ranks: Any, case: Case, wanted: Expected, sharded: bool) -> dict[str, Any]:
    policy = make_policy(
        case.folder,
        layout,
        ranks,
        optimizer=OPTIMIZER | {"distributed": sharded},
        trainer={"num_steps": 5},
    )
    batch = make_batch(case.groups, case.samples, layout, ranks, microbatch_tokens=60, updates=UPDATES)
    metrics = [run_update(policy, batch, number) for number in range(UPDATES)]
    weight, worst = distance(policy, weights(policy), wanted.weights)
    moved, _ = distance(policy, weights(policy), dict(reference.load(case.folder).named_parameters()))
    return {
        "case": f"{layout} {case.name} distributed={sharded}",
        "lr": [entry["policy/lr"] for entry in metrics],
        "norm": [abs(entry["policy/grad_norm"] / norm - 1) for entry, norm in zip(metrics, wanted.norms, strict=True)],
        "loss": [abs(entry["policy/loss"] - loss) for entry, loss in zip(metrics, wanted.losses, strict=True)],
        "weight": weight,
        "worst": worst,
        "moved": moved,
    }


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in COVERED], ids=str)
def test_three_updates_equal_adamw(layout: Layout, cases: dict[str, Case], expected: dict[str, Expected]) -> None:
    assert all(norm > OPTIMIZER["clip_grad"] for wanted in expected.values() for norm in wanted.norms)  # clipping acts
    results = run_ranks(layout.ranks, _train, layout, cases, expected, timeout=100)
    trained = [figures for rank in results for figures in rank]
    for figures in trained:
        assert figures["lr"] == pytest.approx(LEARNING_RATES), figures
        assert max(figures["norm"]) < NORM, figures
        assert max(figures["loss"]) < NORM, figures
        assert figures["weight"] < WEIGHT, figures
        assert figures["moved"] > 100 * WEIGHT, figures
    norm, loss = (max(max(figures[key]) for figures in trained) for key in ("norm", "loss"))
    print(f"\n{layout}: norm {norm:.1e}, loss {loss:.1e}, weight {max(figures['weight'] for figures in trained):.1e}")
