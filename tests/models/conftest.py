from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from megatron_rlvr.types import RolloutGroup
from tests.models import reference
from tests.models.reference import Sample
from tests.tiny import make_folder, make_groups

UNSCORED = (2, 7)  # responses that no verifier could judge


@dataclass(frozen=True)
class Case:
    """A model, a step's rollouts, and what transformers makes of them in fp64."""

    name: str
    folder: Path
    groups: list[RolloutGroup]
    samples: dict[int, Sample]  # by response id; unscored ones are missing
    log_probs: dict[int, Tensor]  # [Lr] by response id
    entropies: dict[int, Tensor]  # [Lr] by response id
    loss: float
    gradients: dict[str, Tensor]


def _case(folder: Path, family: str, tied: bool) -> Case:
    make_folder(folder, family, tied)
    model, groups = reference.load(folder), make_groups(prompts=6, responses=2)
    drawn = reference.samples(model, groups)
    found = {
        index: [value.detach() for value in reference.statistics(model, sample.prompt_ids, sample.response_ids)]
        for index, sample in drawn.items()
    }
    scored = {index: sample for index, sample in drawn.items() if index not in UNSCORED}
    value, gradients = reference.gradients(model, list(scored.values()))
    return Case(
        folder.name,
        folder,
        groups,
        scored,
        {index: values[0] for index, values in found.items()},
        {index: values[1] for index, values in found.items()},
        value,
        gradients,
    )


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """By name: qwen3-tied, qwen3-untied, qwen2-tied and qwen2-untied."""
    root = tmp_path_factory.mktemp("models")
    names = [f"{family}-{head}" for family in ("qwen3", "qwen2") for head in ("tied", "untied")]
    return {name: _case(root / name, name.split("-")[0], name.endswith("-tied")) for name in names}
