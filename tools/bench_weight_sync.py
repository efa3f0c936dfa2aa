"""What a weight sync and its proof cost: python tools/bench_weight_sync.py [--layers 16 --hidden 2048 --tp 1 ...]

A random Qwen3-shaped policy (by default of 1.1 billion parameters) is pushed into a real engine, ``--syncs`` times
after one that warms up. One JSON line per sync: seconds of sync and proof together, the proof's own and its share of
them, bytes, and the share of elements that were compared; the last line holds the medians.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import bench_ranks


def main() -> int:
    parser = bench_ranks.parser(__doc__, "bfloat16", layers=16, hidden=2048, ffn=8192, vocab=32768, tp=1, syncs=5)
    return bench_ranks.on_ranks(bench, parser.parse_args())


def bench(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape(options)))
        measure(folder, options)


def shape(options: argparse.Namespace) -> dict[str, Any]:
    """The model's config.json; heads of 128, four queries to a key-value head."""
    heads = options.hidden // 128
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": options.layers,
        "hidden_size": options.hidden,
        "intermediate_size": options.ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": 128,
        "hidden_act": "silu",
        "vocab_size": options.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "dtype": options.dtype,
    }


def measure(model: str, options: argparse.Namespace) -> None:
    from megatron_rlvr.architecture import Architecture
    from megatron_rlvr.config import Config, DataConfig, ModelConfig, ParallelConfig, RolloutConfig
    from megatron_rlvr.models.build import build_chunks, initialize_parallel
    from megatron_rlvr.rollout.vllm_engine import VllmEngine
    from megatron_rlvr.weights.gather import hf_weights
    from megatron_rlvr.weights.weight_sync import WeightSync

    config = Config(
        model=ModelConfig(path=model, dtype=options.dtype),
        parallel=ParallelConfig(tp=options.tp),
        data=DataConfig(max_prompt_length=64),
        rollout=RolloutConfig(max_response_length=64, kv_cache_mib=64, max_running=4),
    )
    groups = initialize_parallel(config)
    architecture = Architecture.from_folder(model)
    chunks = build_chunks(config, architecture, groups)
    engine = VllmEngine(config, groups)
    sync = WeightSync(engine, architecture, groups)
    rows = []
    for number in range(options.syncs + 1):
        report = sync.push(hf_weights(chunks, architecture, groups))
        row = {
            "sync_seconds": round(report.seconds, 4),
            "proof_seconds": round(report.proof_seconds, 4),
            "proof_share": round(report.proof_seconds / report.seconds, 4),
            "gib": round(report.bytes / 2**30, 3),
            "compared_share": round(report.share, 4),
        }
        if number and groups.rank == 0:
            rows.append(row)
            print(json.dumps(row), flush=True)
    if groups.rank == 0:
        parameters = sum(parameter.numel() for parameter in chunks[0].parameters()) * options.tp
        medians = {name: median(row[name] for row in rows) for name in rows[0]}
        print(json.dumps({"parameters": parameters, "tp": options.tp, "dtype": options.dtype, **medians}))
    engine.close()


if __name__ == "__main__":
    sys.exit(main())
