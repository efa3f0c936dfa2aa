"""A folder -> Megatron chunks on real ranks -> whole tensors: the bytes of the file, on every rank."""

from __future__ import annotations

import pytest
import torch

from megatron_rlvr import platform
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config, ModelConfig, ParallelConfig
from megatron_rlvr.models.build import build_chunks, initialize_parallel
from megatron_rlvr.weights import mapping
from megatron_rlvr.weights.convert import load_hf
from megatron_rlvr.weights.convert_import import import_hf
from megatron_rlvr.weights.gather import hf_weights
from tests.ranks import run_ranks
from tests.weights.tiny_models import save_model, weights_of

MODELS = [("qwen2", False), ("qwen2", True), ("qwen3", False), ("qwen3", True)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family, tied in MODELS:
        folder = tmp_path_factory.mktemp(f"{family}-{'tied' if tied else 'untied'}")
        made[folder] = weights_of(save_model(folder, family, tied))
    import_hf(folder, folder / "megatron")
    return {**made, folder / "megatron": made[folder]}


def gathered(layout: dict, folders: dict, bucket_bytes: int) -> list[str]:
    """Every way in which what this rank gathers differs from the file."""
    platform.start_rank()
    parallel, problems = ParallelConfig(**layout), []
    groups = initialize_parallel(Config(parallel=parallel))
    for folder, wanted in folders.items():
        architecture = Architecture.from_folder(folder)
        config = Config(model=ModelConfig(path=str(folder), dtype="float32"), parallel=parallel)
        chunks = build_chunks(config, architecture, groups)
        assert len(chunks) == parallel.vpp
        load_hf(chunks, architecture, groups, folder)
        found = dict(hf_weights(chunks, architecture, groups, bucket_bytes))
        if list(found) != list(mapping.hf_shapes(architecture)) or set(found) != set(wanted):
            problems.append(f"{folder.name}: {list(found)}")
        problems += [f"{folder.name}: {name}" for name in wanted if not torch.equal(found[name], wanted[name])]
        # The last stage's copy of a tied embedding is not gathered, so it is looked at here.
        table = mapping.entries(architecture)[0]
        shard = mapping.to_megatron(table, [wanted[table.hf[0]]], architecture, groups.tp_rank, groups.tp_size)
        copies = [
            value for chunk in chunks for name, value in chunk.named_parameters() if name == "output_layer.weight"
        ]
        if architecture.tied and not all(torch.equal(copy, shard) for copy in copies):
            problems.append(f"{folder.name}: the last stage's copy of the embedding")
    return problems


@pytest.mark.parametrize(
    ("ranks", "layout", "bucket_bytes"),
    [
        (1, {}, 256 << 20),
        (2, {"tp": 2}, 256 << 20),
        (2, {"pp": 2, "vpp": 2}, 256 << 20),
        (4, {"tp": 2, "pp": 2}, 20000),
    ],
)
def test_gathered_weights_are_the_files(folders, ranks, layout, bucket_bytes):
    assert run_ranks(ranks, gathered, layout, folders, bucket_bytes) == [[]] * ranks
