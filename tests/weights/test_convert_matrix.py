"""Hugging Face -> Megatron -> Hugging Face for every family, tied and untied, in every layout: the bits and the logits.

Each layout loads the imported folder with megatron's own ``dist_checkpointing``; what that layout then saves is
exported too.
"""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
import transformers
from megatron.core import dist_checkpointing, parallel_state
from safetensors.torch import load_file

from megatron_rlvr import platform
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config, ModelConfig, ParallelConfig
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.models import build, schedule
from megatron_rlvr.types import Microbatch
from megatron_rlvr.weights.convert_export import export_megatron
from megatron_rlvr.weights.convert_import import import_hf
from tests.ranks import run_ranks
from tests.weights.tiny_models import CONFIGS, VOCAB, save_model

LOGITS = 1e-5  # absolute; the largest logits are about 3
IDS = torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Case:
    """A model in a layout; experts are dealt out over ep replicas of everything else."""

    family: str
    tied: bool
    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.ep

    def __str__(self) -> str:
        return f"{self.family}-{'tied' if self.tied else 'untied'}-tp{self.tp}-pp{self.pp}-ep{self.ep}"


DENSE = [Case(family, tied, tp, pp) for family, tied, tp, pp in itertools.product(
    ("qwen2", "qwen3", "llama"), (True, False), (1, 2, 4), (1, 2))]  # fmt: skip
MIXTURES = [Case("qwen3_moe", tied, tp, pp, ep) for tied, tp, pp, ep in itertools.product(
    (True, False), (1, 2), (1, 2), (1, 2)) if tp * pp * ep <= 4]  # fmt: skip
# Every family meets every size of each dimension, every size meets tied and untied.
PAIRWISE = [
    Case("qwen2", True, pp=2), Case("qwen2", False, tp=2), Case("qwen3", True, tp=2, pp=2), Case("qwen3", False, tp=4),
    Case("llama", True, tp=4), Case("llama", False, tp=2, pp=2), Case("qwen3_moe", True, ep=2),
    Case("qwen3_moe", False, tp=2, pp=2),
]  # fmt: skip


def load_and_save(cases: dict[Case, tuple[Path, Path]]) -> dict[Case, torch.Tensor]:
    """Each folder loaded by Megatron alone and saved again beside -> logits [t, V], on the last stage."""
    platform.start_rank()
    found = {}
    for case, (folder, saved) in cases.items():
        config = Config(model=ModelConfig(str(folder), dtype="float32"), parallel=ParallelConfig(case.tp, case.pp))
        architecture = Architecture.from_folder(folder)
        with platform.megatron_calls():
            parallel_state.initialize_model_parallel(case.tp, case.pp, expert_model_parallel_size=case.ep)
            build.model_parallel_cuda_manual_seed(1)
            groups = ParallelGroups.from_megatron()
            megatron = build.transformer_config(config, architecture)
            megatron.expert_model_parallel_size = case.ep
            chunk = build._build_chunk(config, architecture, groups, megatron, 0)
            state = dist_checkpointing.load(chunk.sharded_state_dict(), str(folder))
            chunk.load_state_dict(state)
            dist_checkpointing.save(chunk.sharded_state_dict(), str(saved))
        for logits in schedule.forward([chunk.eval()], [microbatch()], lambda output, micro: output):
            found[case] = gathered(logits, groups)[:, :VOCAB].numpy()
        parallel_state.destroy_model_parallel()
    return found


def gathered(logits: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """[t, V / tp] of each tensor-parallel rank -> [t, V]."""
    if groups.tp is None:
        return logits
    parts = [torch.empty_like(logits) for _ in range(groups.tp_size)]
    torch.distributed.all_gather(parts, logits.contiguous(), groups.tp)
    return torch.cat(parts, dim=1)


def microbatch() -> Microbatch:
    """One response of IDS; what no forward pass reads is left out."""
    unread = dict.fromkeys((item.name for item in fields(Microbatch)), torch.empty(0))
    places = torch.arange(len(IDS))
    bounds = torch.tensor([0, len(IDS)], dtype=torch.int32)
    return Microbatch(**unread | {"token_ids": IDS, "position_ids": places, "cu_seqlens": bounds, "extras": {}})


def check(cases: list[Case], tmp_path: Path) -> None:
    """Import, load, save and export all of them, those with as many ranks in the same processes."""
    folders, sources, models = {}, {}, {}
    for family, tied in {(case.family, case.tied) for case in cases}:
        sources[family, tied] = tmp_path / f"{family}-{tied}"
        shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
        models[family, tied] = save_model(sources[family, tied], family, tied, **shape)
    for case in cases:
        folders[case] = (tmp_path / f"{case}.megatron", tmp_path / f"{case}.saved")
        import_hf(sources[case.family, case.tied], folders[case][0], case.tp, case.pp)
        folders[case][1].mkdir()
    logits = {}
    for ranks in sorted({case.ranks for case in cases}):
        alike = {case: folders[case] for case in cases if case.ranks == ranks}
        for found in run_ranks(ranks, load_and_save, alike, timeout=60 + 20 * len(alike)):
            logits |= found
    for case in cases:
        expected = models[case.family, case.tied](IDS[None]).logits[0].detach()
        assert expected.abs().max() > 1
        gap = float((torch.from_numpy(logits[case]) - expected).abs().max())
        print(f"{case}: logits {gap:.1e}")
        assert gap <= LOGITS, case
        exports_equal(case, sources[case.family, case.tied], *folders[case], tmp_path)


def exports_equal(case: Case, source: Path, imported: Path, saved: Path, tmp_path: Path) -> None:
    """What was imported, and what the layout saved, come back as the very tensors, and transformers loads them."""
    shutil.copy(source / "config.json", saved)
    expected = load_file(source / "model.safetensors")
    for folder in (imported, saved):
        target = tmp_path / f"{folder.name}.hf"
        export_megatron(folder, target)
        found = load_file(target / "model.safetensors")
        assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected), case
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"], report
        assert type(loaded.config) is CONFIGS[case.family]
        assert json.loads((target / "tokenizer_config.json").read_text()) if folder == imported else True


def test_pairs_of_every_two_settings(tmp_path: Path) -> None:
    check(PAIRWISE, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_family_and_layout(ranks: int, tmp_path: Path) -> None:
    check([case for case in DENSE + MIXTURES if case.ranks == ranks], tmp_path)
