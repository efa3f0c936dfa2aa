"""Token statistics beside the alternatives: python tools/bench_token_statistics.py [--tokens 1024 --tp 2 ...]

Forward and backward over the same random logits: ours (log-prob, exact entropy and kept mass, with gradients of all
three), plain PyTorch over whole logits (the same three; with one rank), and megatron-core's cross-entropy, plain and
fused, which give the log-prob alone. One JSON line each: median CPU seconds per pass of the slowest rank, rounds
interleaved; peak memory beside the logits in bytes per logits element (gradients included, as they are part of every
alternative but ours, which writes them over the logits); collectives in forward and backward. Ratios come last.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import bench_ranks

NAIVE_BYTES = 28  # per logits element, forward and backward (float32)


def main() -> int:
    parser = bench_ranks.parser(__doc__, "float32", tokens=1024, vocab=151_936, tp=1, rounds=5)
    return bench_ranks.on_ranks(bench, parser.parse_args())


def bench(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from megatron_rlvr import platform
    from megatron_rlvr.config import Config, ParallelConfig
    from megatron_rlvr.models.build import initialize_parallel

    groups = initialize_parallel(Config(parallel=ParallelConfig(tp=options.tp)))
    torch.manual_seed(groups.rank)
    dtype = getattr(torch, options.dtype)
    columns = options.vocab // options.tp
    logits = (torch.randn(options.tokens, columns, device=platform.device()) * 3).to(dtype)
    torch.manual_seed(0)  # the same targets on every rank
    targets = torch.randint(options.vocab, (options.tokens,), device=logits.device)
    figures: dict[str, dict[str, Any]] = {}
    passes = alternatives(options, groups, logits.numel())
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(options.rounds + 1):
        for name, run in passes.items():
            row = measure(run, logits, targets)
            if number:  # the first one compiles
                seconds[name].append(row["cpu_seconds"])
                figures[name] = row
    for name, row in figures.items():
        slowest = torch.tensor(median(seconds[name]))
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        row["cpu_seconds"] = round(float(slowest), 4)
        if groups.rank == 0:
            case = {name: getattr(options, name) for name in ("tokens", "vocab", "tp", "dtype")}
            print(json.dumps({"implementation": name, **case, **row}), flush=True)
    if groups.rank == 0:
        ours = figures["ours"]["cpu_seconds"]
        print(json.dumps({f"ours / {name}": round(ours / row["cpu_seconds"], 3) for name, row in figures.items()}))


def alternatives(options: argparse.Namespace, groups: Any, elements: int) -> dict[str, Callable]:
    """name -> (logits that need a gradient, targets) -> the scalar to differentiate."""
    import torch
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_rlvr.distributed.vocab import token_statistics

    def ours(logits, targets):
        found = token_statistics(logits, targets, group=groups.tp, min_p=0.02, overwrite=True)
        return (found.log_prob + 0.1 * found.entropy + 0.1 * found.log_kept_mass).sum()

    def naive(logits, targets):
        log_p = torch.log_softmax(logits.float(), dim=1)
        p = log_p.exp()
        kept = p >= 0.02 * p.amax(1, keepdim=True)
        log_kept_mass = torch.where(kept, p, 0.0).sum(1).log()
        log_prob = log_p.gather(1, targets[:, None])[:, 0]
        return (log_prob - 0.1 * (p * log_p).sum(1) + 0.1 * log_kept_mass).sum()

    def megatron(logits, targets):
        return -vocab_parallel_cross_entropy(logits[:, None], targets[:, None]).sum()

    def megatron_fused(logits, targets):
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
        return -fused_vocab_parallel_cross_entropy(logits[:, None], targets[:, None], group).sum()

    found = {"ours": ours, "megatron": megatron, "megatron_fused": megatron_fused}
    if options.tp == 1:
        needed = elements * (NAIVE_BYTES + 8)
        if needed < free_bytes():
            found["naive"] = naive
        elif groups.rank == 0:
            print(json.dumps({"implementation": "naive", "not_run": f"would need {needed / 2**30:.1f} GiB"}))
    return found


def measure(run: Callable, logits: Any, targets: Any) -> dict[str, Any]:
    """One forward and backward over a copy of ``logits``."""
    import torch
    import torch.distributed as dist

    from megatron_rlvr import platform

    # A copy that is not a leaf, as a model's logits are: whoever wants may write over it.
    source = logits.clone().requires_grad_()
    copy = source.view_as(source)
    calls = count_collectives()
    gc.collect()
    dist.barrier()
    before = memory(reset=True)
    started = time.process_time()
    with platform.megatron_calls():
        total = run(copy, targets)
        forward = calls["count"]
        (gradient,) = torch.autograd.grad(total, source)
    spent = time.process_time() - started
    peak = memory() - before
    assert gradient.shape == logits.shape and gradient.isfinite().all()
    calls["restore"]()
    return {
        "cpu_seconds": spent,
        "bytes_per_element": round(peak / logits.numel(), 2),
        "collectives": [forward, calls["count"] - forward],
    }


def count_collectives() -> dict[str, Any]:
    """Counts calls of torch.distributed.all_reduce from here on, until ``restore`` is called."""
    import torch.distributed as dist

    original, calls = dist.all_reduce, {"count": 0}

    def counted(*args, **kwargs):
        calls["count"] += 1
        return original(*args, **kwargs)

    dist.all_reduce = counted
    calls["restore"] = lambda: setattr(dist, "all_reduce", original)
    return calls


def memory(reset: bool = False) -> int:
    """Peak bytes since the last reset: of the GPU, or of this process's resident memory (Linux)."""
    import torch

    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def free_bytes() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
