"""Token statistics beside the alternatives: python tools/bench_token_statistics.py [--tokens 1024 --tp 2 ...]

Forward and backward over the same random logits: ours (log-prob, exact entropy and kept mass, with gradients of all
three), plain PyTorch over whole logits (the same three; with one rank), megatron-core's cross-entropy, plain and fused,
which give the log-prob alone, with --peers slime's, verl's and NeMo-RL's log-prob and entropy, and a copy of the
logits. Then from hidden states [tokens, --hidden] and the output layer's weight: ours without logits, also with float32
blocks of them, beside the four matrix products that it cannot do without. One JSON line each: median seconds per pass
of the slowest rank, of CPU time or of the GPU's own (which a host that is ahead keeps busy, as in training) beside the
host's to start that work, rounds interleaved; peak memory beside the inputs in bytes, and in bytes per logits element
(gradients included, save where they are written over the logits or into a buffer that is there); collectives in forward
and backward. Ratios come last, with the share of a copy's bytes per second that ours reaches.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import bench_peers
import bench_ranks

NAIVE_BYTES = 28  # per logits element, forward and backward (float32)

HEAD_START = 10**8  # cycles, some 50 ms, in which the host starts what a GPU is timed with

TRAFFIC = 4  # matrices of logits: ours reads them three times and writes them once; a copy moves two

Run = Callable[[Any, Any], Any]  # (logits or hidden states that need a gradient, targets) -> scalar to differentiate


def main() -> int:
    parser = bench_ranks.parser(__doc__, "float32", tokens=1024, vocab=151_936, hidden=1024, tp=1, rounds=5)
    parser.add_argument("--peers", metavar="DIR", help="folder with source trees named slime, verl, nemo_rl")
    options = parser.parse_args()
    if options.peers:
        bench_peers.trees(options.peers)  # a wrong folder is refused before any rank starts
    return bench_ranks.on_ranks(bench, options)


def bench(options: argparse.Namespace) -> None:
    import torch

    from megatron_rlvr import platform
    from megatron_rlvr.config import Config, ParallelConfig
    from megatron_rlvr.models.build import initialize_parallel

    groups = initialize_parallel(Config(parallel=ParallelConfig(tp=options.tp)))
    dtype, columns = getattr(torch, options.dtype), options.vocab // options.tp

    def random(seed: int, rows: int, width: int, scale: float) -> Any:
        torch.manual_seed(seed)
        return (torch.randn(rows, width, device=platform.device()) * scale).to(dtype)

    torch.manual_seed(0)  # the same targets and hidden states on every rank
    targets = torch.randint(options.vocab, (options.tokens,), device=platform.device())
    hidden = random(0, options.tokens, options.hidden, 1.0)
    logits = random(1 + groups.rank, options.tokens, columns, 3.0)
    ratios = compare(options, groups, with_logits(options, groups, logits), logits, targets, columns)
    ratios["ours, share of a copy's rate"] = round(TRAFFIC / 2 / ratios["ours / copy"], 3)
    del logits
    weight = random(1 + groups.rank, columns, options.hidden, 3.0 * options.hidden**-0.5)
    ratios |= compare(options, groups, without_logits(groups, weight), hidden, targets, columns)
    if groups.rank == 0:
        print(json.dumps(ratios))


def compare(
    options: argparse.Namespace, groups: Any, passes: dict[str, Run], source: Any, targets: Any, columns: int
) -> dict[str, float]:
    """Prints the figures of each of ``passes`` over ``source``; the first one's time over each of the others'."""
    import torch
    import torch.distributed as dist

    figures: dict[str, dict[str, Any]] = {}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in passes}
    last = options.rounds + 1
    for number in range(last + 1):
        for name, run in passes.items():
            spent, figures[name] = measure(run, source, targets, options.tokens * columns, of_memory=number == last)
            if 0 < number < last:  # the first one compiles
                times[name].append(spent)
    kinds = list(times[next(iter(passes))][0])
    slowest = torch.tensor([[median(spent[kind] for spent in times[name]) for kind in kinds] for name in passes])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    medians = {name: dict(zip(kinds, row, strict=True)) for name, row in zip(passes, slowest.tolist(), strict=True)}
    if groups.rank == 0:
        case = {name: getattr(options, name) for name in ("tokens", "vocab", "tp", "dtype")}
        for name, row in figures.items():
            spent = {kind: round(value, 6) for kind, value in medians[name].items()}
            print(json.dumps({"implementation": name, **case, **spent, **row}), flush=True)
    ours, *others = passes
    return {f"{ours} / {name}": round(medians[ours]["seconds"] / medians[name]["seconds"], 3) for name in others}


def with_logits(options: argparse.Namespace, groups: Any, like: Any) -> dict[str, Run]:
    import torch
    from megatron.core import parallel_state
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

    tp_group = parallel_state.get_tensor_model_parallel_group()

    def megatron_fused(logits, targets):
        return -fused_vocab_parallel_cross_entropy(logits[:, None], targets[:, None], tp_group).sum()

    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            ctx.save_for_backward(room.copy_(logits))
            return room[0, 0].clone()

        @staticmethod
        def backward(ctx, upstream):
            return ctx.saved_tensors[0]

    room = torch.empty_like(like)
    found = {"ours": ours, "megatron": megatron, "megatron_fused": megatron_fused}
    found["copy"] = lambda logits, targets: Copy.apply(logits)
    if options.peers:
        found |= bench_peers.from_trees(options.peers, tp_group, groups.tp_rank)
    if options.tp == 1:
        needed = options.tokens * options.vocab * (NAIVE_BYTES + 8)
        if needed < free_bytes():
            found["naive"] = naive
        elif groups.rank == 0:
            print(json.dumps({"implementation": "naive", "not_run": f"would need {needed / 2**30:.1f} GiB"}))
    return found


def without_logits(groups: Any, weight: Any) -> dict[str, Run]:
    """All add the weight's gradient to the same fp32 buffer, as training does."""
    import torch

    from megatron_rlvr.distributed.vocab_linear import linear_token_statistics

    weight.requires_grad_()
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)

    def linear(hidden, targets, logits_dtype=None):
        found = linear_token_statistics(hidden, weight, targets, group=groups.tp, logits_dtype=logits_dtype, min_p=0.02)
        return (found.log_prob + 0.1 * found.entropy + 0.1 * found.log_kept_mass).sum()

    class FourProducts(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            ctx.save_for_backward(hidden)
            return (hidden @ weight.t())[0, 0]

        @staticmethod
        def backward(ctx, upstream):
            (hidden,) = ctx.saved_tensors
            gradient = hidden @ weight.t()
            weight.main_grad.add_(gradient.t() @ hidden)
            return gradient @ weight

    return {
        "linear": linear,
        "linear_float32": partial(linear, logits_dtype=torch.float32),
        "products": lambda hidden, targets: FourProducts.apply(hidden),
    }


def measure(
    run: Run, source: Any, targets: Any, elements: int, of_memory: bool
) -> tuple[dict[str, float], dict[str, Any]]:
    """(times, other figures) of a forward and backward over a copy of ``source``, whose logits have so many elements.

    What was freed before is used again without being seen: ``of_memory`` gives it back first, which takes time after.
    """
    import torch
    import torch.distributed as dist

    from megatron_rlvr import platform

    # A copy that is not a leaf, as a model's logits are: whoever wants may write over it.
    leaf = source.clone().requires_grad_()
    copy = leaf.view_as(leaf)
    calls = count_collectives()
    gc.collect()
    if of_memory:
        ctypes.CDLL(None).malloc_trim(0)
    dist.barrier()
    before = memory(reset=True)
    stop = start_clock()
    with platform.megatron_calls():
        total = run(copy, targets)
        forward = calls["count"]
        (gradient,) = torch.autograd.grad(total, leaf)
    spent = stop()
    peak = memory() - before
    assert gradient.shape == source.shape and gradient.isfinite().all()
    calls["restore"]()
    return spent, {
        "bytes": peak,
        "bytes_per_element": round(peak / elements, 2),
        "collectives": [forward, calls["count"] - forward],
    }


def start_clock() -> Callable[[], dict[str, float]]:
    """What stops it and tells the seconds: of this process on the CPU, which other work does not add to, or of the GPU.

    The GPU is made to wait until the host has started all work: its own time is then what the work takes, without the
    host's, which is ``host_seconds``. Where that is more than HEAD_START, or the work makes the host wait for the GPU,
    the GPU's time has some of it.
    """
    import torch

    if not torch.cuda.is_available():
        began = time.process_time()
        return lambda: {"seconds": time.process_time() - began}
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    first.record()
    began = time.perf_counter()

    def stop() -> dict[str, float]:
        last.record()
        host = time.perf_counter() - began
        last.synchronize()
        return {"seconds": first.elapsed_time(last) / 1e3, "host_seconds": host}

    return stop


def count_collectives() -> dict[str, Any]:
    """Counts calls of torch.distributed.all_reduce from here on, until ``restore`` is called."""
    import torch.distributed as dist

    original, calls = dist.all_reduce, dict[str, Any](count=0)

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
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
