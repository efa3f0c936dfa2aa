"""The planner's memory beside what a step takes on this machine: python tools/bench_plan.py [--layers 8 ...]

A random Qwen3-shaped policy (by default of 117 million parameters) makes old log-probs and two updates in each layout.
One JSON line per layout: the largest rank's peak beyond what it holds before the model is built (its imports, stated
apart), what the planner predicts for it, their ratio, and the share of the peak that is weights, gradients and
optimizer state. The last line holds the worst ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_weight_sync import shape

from megatron_rlvr.config import Config, check, from_dict
from megatron_rlvr.config_reading import apply_override
from megatron_rlvr.launch.local import run_ranks
from megatron_rlvr.planner.devices import DEVICES
from megatron_rlvr.planner.memory import Item, state_items, training_items
from megatron_rlvr.planner.workload import Workload
from megatron_rlvr.weights.initial import write_initial

if TYPE_CHECKING:
    from megatron_rlvr.distributed.groups import ParallelGroups
    from megatron_rlvr.distributed.vocab import StatisticsOptions
    from megatron_rlvr.models.policy import Policy

# Dotted overrides of each layout; the policy's state is at least half of the peak in all of them.
LAYOUTS = {
    "one rank": [],
    "bf16": ["model.dtype=bfloat16"],
    "bf16, logits fused": ["model.dtype=bfloat16", "model.logits=fused"],
    "recompute full": ["model.recompute=full"],
    "tp 2": ["parallel.tp=2"],
    "tp 2, sequence parallel": ["parallel.tp=2", "parallel.sequence_parallel=true"],
    "pp 2": ["parallel.pp=2"],
    "dp 2": ["parallel.dp=2"],
    "cp 2": ["parallel.cp=2"],
    "tp 2, cp 2, sequence parallel": ["parallel.tp=2", "parallel.cp=2", "parallel.sequence_parallel=true"],
    "dp 2, optimizer not sharded": ["parallel.dp=2", "optimizer.distributed=false"],
    "tp 2, pp 2": ["parallel.tp=2", "parallel.pp=2"],
}
SIZES = {"layers": 8, "hidden": 1024, "ffn": 3072, "vocab": 8192, "microbatch": 512}
PROMPT, LENGTH = 32, 128  # tokens of a prompt, and of it with its response
RESPONSES, UPDATES = 8, 2  # responses per update and data-parallel rank


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), help="default: all of them")
    parser.add_argument("--rank-of", nargs="*", help=argparse.SUPPRESS)  # a folder, then overrides: be one of its ranks
    options = parser.parse_args()
    if options.rank_of:
        folder, *overrides = options.rank_of
        be_rank(Path(folder), options, overrides)
        return 0
    ratios = []
    for name in options.layouts:
        with tempfile.TemporaryDirectory() as folder:
            row = {"layout": name} | measure(Path(folder), options, LAYOUTS[name])
        ratios.append(row["predicted / measured"])
        print(json.dumps(row), flush=True)
    print(json.dumps({"worst": max(ratios, key=lambda ratio: abs(ratio - 1))}))
    return 0


def measure(folder: Path, options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Run one layout's ranks, and plan it."""
    config = make_config(folder, options, overrides)
    write_initial(config.model.path, folder / "model", 0)
    sizes = [text for name in SIZES for text in (f"--{name}", str(getattr(options, name)))]
    command = [sys.executable, __file__, *sizes, "--rank-of", str(folder), *overrides]
    # Freed blocks go back to the system at once: then what is resident is what is allocated.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    if code := run_ranks(command, config.world_size, 0, environment):
        raise SystemExit(code)
    found = [json.loads(path.read_text()) for path in folder.glob("rank_*.json")]
    peak = max(row["peak"] - row["before"] for row in found)
    workload, device = Workload.of(config), DEVICES["cpu"]
    stages = [
        (_sum(state_items(config, workload, stage)), _sum(training_items(config, workload, device, stage)))
        for stage in range(config.parallel.pp)
    ]
    state, passing = max(stages, key=sum)
    return {
        "ranks": config.world_size,
        "imports_mib": max(row["before"] for row in found) >> 20,
        "measured_mib": peak >> 20,
        "predicted_mib": (state + passing) >> 20,
        "predicted / measured": round((state + passing) / peak, 3),
        "state_share": round(state / peak, 2),
    }


def _sum(items: Iterable[Item]) -> int:
    return sum(item.bytes for item in items)


def make_config(folder: Path, options: argparse.Namespace, overrides: list[str]) -> Config:
    """The bench's model and batch: ``RESPONSES`` responses of ``LENGTH`` tokens per data-parallel rank and update."""
    options.dtype = "float32"
    (folder / "shape").mkdir(exist_ok=True)
    (folder / "shape" / "config.json").write_text(json.dumps(shape(options)))
    tree: dict[str, Any] = {
        "verifier": "math",
        "model": {"path": str(folder / "shape"), "dtype": "float32"},
        "data": {"path": "unused", "max_prompt_length": PROMPT},
        "rollout": {"max_response_length": LENGTH - PROMPT, "responses_per_prompt": RESPONSES},
        "trainer": {"microbatch_tokens": options.microbatch, "updates_per_rollout": UPDATES},
    }
    for override in overrides:
        apply_override(tree, override)
    config = from_dict(Config, tree)
    config.rollout.prompts_per_step = UPDATES * config.parallel.dp
    check(config)
    return config


def be_rank(folder: Path, options: argparse.Namespace, overrides: list[str]) -> None:
    """Build the policy, make a step, and write what was resident before and at the peak."""
    import torch

    from megatron_rlvr import platform
    from megatron_rlvr.architecture import Architecture
    from megatron_rlvr.distributed import groups as process_groups
    from megatron_rlvr.distributed.vocab import StatisticsOptions, token_statistics
    from megatron_rlvr.models.build import initialize_parallel
    from megatron_rlvr.models.policy import Policy

    warnings.simplefilter("ignore")
    config = make_config(folder, options, overrides)
    platform.start_rank()
    process_groups.init(600.0)
    groups = initialize_parallel(config)
    architecture = Architecture.from_folder(config.model.path)
    logits = torch.zeros(8, architecture.padded_vocab(groups.tp_size) // groups.tp_size, requires_grad=True)
    token_statistics(logits, torch.zeros(8, dtype=torch.long)).entropy.sum().backward()  # imports torch's compiler
    before = resident("VmRSS")
    config.model.path = str(folder / "model")
    policy = Policy(config, architecture, groups)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, without what loading took
    step(config, policy, groups, StatisticsOptions())
    found = {"before": before, "peak": resident("VmHWM")}
    (folder / f"rank_{groups.rank}.json").write_text(json.dumps(found))
    process_groups.destroy()


def step(config: Config, policy: Policy, groups: ParallelGroups, options: StatisticsOptions) -> None:
    """What trainer.py does between rollout and weight sync, with made-up responses, all of full length."""
    import torch

    from megatron_rlvr.packing import pack
    from megatron_rlvr.types import Prompt, Rollout, RolloutGroup

    def rollout(index: int) -> Rollout:
        return Rollout(index, [7] * (LENGTH - PROMPT), [-1.0] * (LENGTH - PROMPT), "stop", policy_version=0)

    prompts = [
        Prompt(str(row), "", tuple(range(PROMPT)), "toy", None) for row in range(config.rollout.prompts_per_step)
    ]
    rollouts = [RolloutGroup(prompt, [rollout(index) for index in range(RESPONSES)]) for prompt in prompts]
    batch = pack(
        rollouts,
        [[1.0] * RESPONSES for _ in prompts],
        updates=UPDATES,
        microbatch_tokens=config.trainer.microbatch_tokens,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        microbatch_multiple=1,
    )
    policy.fill_log_probs(batch, options)
    for update in batch.updates:
        policy.update(
            batch, update, lambda micro, now, meter: torch.where(micro.loss_mask, now.log_prob, 0).sum(), options
        )


def resident(field: str) -> int:
    """Bytes of this process that are (VmRSS), or at most were (VmHWM), in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    sys.exit(main())
