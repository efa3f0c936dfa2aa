"""What fits is planned, what does not is refused with a change that then passes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlvr.planner.devices import DEVICES, GIB
from megatron_rlvr.planner.fixes import suggestions
from megatron_rlvr.planner.memory import predict
from megatron_rlvr.planner.plan import Plan, make_plan
from megatron_rlvr.planner.problems import Machine, problems
from megatron_rlvr.planner.text import as_overrides, as_text
from megatron_rlvr.planner.workload import Workload
from tests.test_examples import CONFIGS

ROOT = Path(__file__).parents[2]
SHIPPED = [path for path in CONFIGS if path.startswith(("examples/lp_reg/q", "examples/cde/")) and "/_" not in path]
QWEN32, QWEN14, CDE = "lp_reg/qwen2.5_32b/lp_reg_on", "lp_reg/qwen3_14b/lp_reg_off", "cde/grpo_ppl"


def plan(name: str, overrides: str = "", gpus: int = 64, gpu: str = "h100") -> Plan:
    return make_plan(ROOT / f"examples/{name}.yaml", overrides.split(), gpus, gpu)


@pytest.mark.parametrize("path", SHIPPED)
def test_every_shipped_config_fits_the_gpus_it_names(path: str) -> None:
    gpus = 8 if "/cde/" in path else 64
    found = make_plan(ROOT / path, (), gpus, "h100")
    assert found.fits, found.problems
    assert found.suggestions and found.gpu_hours[0] < found.gpu_hours[1]


# (config, overrides, GPUs, kind), words of the refusal, keys of the fix
INVALID = {
    "heads": ((QWEN32, "parallel.tp=16 parallel.dp=4", 64), "40 attention heads", {"parallel.tp", "parallel.dp"}),
    "key-value heads": (
        (CDE, "model.path=Qwen2.5-1.5B parallel.tp=4 parallel.dp=2", 8),
        "2 key-value heads",
        {"parallel.tp", "parallel.dp"},
    ),
    "a critic's key-value heads": (
        ("cde/ppo", "critic.path=Qwen2.5-1.5B parallel.tp=4 parallel.dp=2", 8),
        "2 key-value heads",
        {"parallel.tp", "parallel.dp"},
    ),
    "no sequence parallelism left": (
        (CDE, "model.path=Qwen2.5-0.5B parallel.tp=3 parallel.dp=1", 3),
        "14 attention heads",
        {"parallel.sequence_parallel"},
    ),
    "context": (
        (CDE, "parallel.tp=1 parallel.cp=3 parallel.dp=2 parallel.sequence_parallel=false", 8),
        "parallel.tp=1 x parallel.cp=3 must divide the model's 32 attention heads",
        {"parallel.cp"},
    ),
    "layers": (
        (QWEN14, "parallel.tp=4 parallel.pp=16 parallel.dp=1", 64),
        "must divide the model's 40 layers",
        {"parallel.pp", "parallel.dp"},
    ),
    "interleaving": ((QWEN32, "parallel.vpp=2", 64), "needs parallel.pp > 1", {"parallel.vpp"}),
    "ranks": ((QWEN32, "parallel.dp=7", 64), "56 ranks, but there are 64 GPUs", {"parallel.dp"}),
    "engine ranks": ((QWEN32, "rollout.tp=3", 64), "must divide the number of ranks", {"rollout.tp"}),
    "sequence parallel": (
        (CDE, "parallel.tp=1 parallel.dp=8", 8),
        "needs parallel.tp > 1",
        {"parallel.sequence_parallel"},
    ),
    "updates": ((QWEN32, "trainer.updates_per_rollout=7", 64), "must divide rollout.prompts_per_step", {"trainer"}),
    "responses": (
        (QWEN32, "rollout.prompts_per_step=3 rollout.responses_per_prompt=1", 64),
        "an update has 3 responses",
        {"parallel.dp"},
    ),
    "microbatch": (
        (QWEN32, "trainer.microbatch_tokens=4096", 64),
        "must hold the longest response",
        {"trainer.microbatch_tokens"},
    ),
    "positions": (
        (QWEN14, "rollout.max_response_length=31000 trainer.microbatch_tokens=34000", 64),
        "positions end at 32768",
        {"rollout.max_response_length"},
    ),
    "training memory": (
        (QWEN32, "model.recompute=none trainer.microbatch_tokens=65536", 64),
        "training is predicted to take",
        {"model.recompute"},
    ),
    "state": ((QWEN32, "parallel.tp=1 parallel.sequence_parallel=false parallel.dp=64", 64), "GiB", {"parallel"}),
    "engine share": (
        (QWEN32, "rollout.gpu_memory_utilization=0.9", 64),
        "must fit together",
        {"rollout.gpu_memory_utilization"},
    ),
    "key-value cache": (
        (QWEN32, "rollout.gpu_memory_utilization=0.2", 64),
        "one sequence of 10,240 tokens",
        {"rollout.tp"},
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_layout_is_refused_with_a_fix_that_passes(name: str) -> None:
    asked, words, keys = INVALID[name]
    found = plan(*asked)
    assert not found.fits and any(words in problem for problem in found.problems), found.problems
    assert found.fix and any(key.startswith(tuple(keys)) for key in found.fix), found.fix
    # The fix as a person would use it: behind the same command.
    config, overrides, gpus = asked
    again = plan(config, f"{overrides} {as_overrides(found.fix)}", gpus)
    assert again.fits, again.problems
    assert f"fix: {as_overrides(found.fix)}" in as_text(found)


@pytest.mark.parametrize("asked", [(QWEN32, "", 64), (CDE, "parallel.pp=2 parallel.vpp=2 parallel.dp=2", 8)])
def test_every_suggestion_fits_and_the_quickest_is_first(asked: tuple[str, str, int]) -> None:
    """Behind the same command, as a person would use it; where one stage is left, nothing interleaves."""
    found, (name, overrides, gpus) = plan(*asked), asked
    for item in found.suggestions:
        assert plan(name, f"{overrides} {as_overrides(item.change)}", gpus).fits, item.change
    seconds = [item.step_seconds for item in found.suggestions]
    assert seconds == sorted(seconds) and len(seconds) == 5


def test_context_parallelism_is_kept_and_never_the_first_thing_to_try() -> None:
    found = plan(CDE, "parallel.tp=1 parallel.cp=2 parallel.dp=4 parallel.sequence_parallel=false", 8)
    assert found.fits and all(item.change.get("parallel.cp", 2) == 2 for item in found.suggestions)
    assert "tp 1 x cp 2 x pp 1 x dp 4" in as_text(found)
    tight = plan(CDE, "model.path=Qwen2.5-1.5B model.recompute=none trainer.microbatch_tokens=81920", 8)
    assert tight.fix == {"model.recompute": "full"}  # though cp=2 would do, and layouts are tried before


def test_ranks_that_compute_a_microbatch_together_are_of_one_node() -> None:
    found = plan(QWEN32, "model.path=Qwen3-32B parallel.tp=4 parallel.cp=2 parallel.dp=8")
    fitting = suggestions(found.config, found.workload, found.machine, found.lengths, most=100)
    assert {item.change["parallel.tp"] for item in fitting} == {1, 2, 4}  # x cp=2


@pytest.mark.parametrize(
    ("override", "fix"),
    [(f"{key}=0", f"{key}=") for key in ("parallel.tp", "parallel.cp", "parallel.pp", "parallel.vpp", "parallel.dp")]
    + [
        ("trainer.updates_per_rollout=0", "trainer.updates_per_rollout="),
        ("trainer.num_steps=-1", "none found: change"),
    ],
)
def test_what_is_no_number_of_anything_is_refused_and_not_divided_by(override: str, fix: str) -> None:
    found = plan(QWEN32, override)
    assert f"{override.partition('=')[0]} must be at least" in found.problems[-1] and f"fix: {fix}" in as_text(found)


def test_no_fix_where_the_gpus_cannot_hold_the_model() -> None:
    found = plan(QWEN32, "parallel.tp=1 parallel.dp=1", gpus=1)
    assert not found.fits and found.fix is None and not found.suggestions
    assert "fix: none found: change what is named above" in as_text(found)


def test_the_door() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "tools/plan.py", f"examples/{QWEN32}.yaml", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": "."})

    done = run("--gpus", "64", "trainer.num_steps=10", "--gpu", "h200", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["predicted"] and found["gpu"] == "h200"
    assert found["gpu_hours"]["expected"] == pytest.approx(10 * 64 * found["step_seconds"]["expected"] / 3600)
    refused = run("--gpus", "63")
    assert refused.returncode == 2 and "REFUSED" in refused.stdout and "fix:" not in refused.stderr
    assert run("--gpus", "64", "prepare=make.py", "model.path=not/there").returncode == 0  # the run makes it first
    negative = run("--gpus", "64", "--response-tokens", "-5")
    assert (
        negative.returncode == 2
        and "--response-tokens must be above 0 and at most 8192, the longest, not -5" in negative.stdout
    )
    mistaken = run("--gpus", "64", "paralel.tp=2")
    assert mistaken.returncode == 2 and "did you mean" in mistaken.stdout


def test_the_stage_that_decides_is_looked_at() -> None:
    """An untied model's last stage has the output layer and the final norm, its first the most activations."""
    config = plan(QWEN32, "parallel.tp=8 parallel.pp=4 parallel.dp=2 model.recompute=none").config
    found = predict(config, Workload.of(config), DEVICES["h100"])
    assert found[0].training_peak > found[1].training_peak > found[2].training_peak
    assert max(found, key=lambda stage: stage.generation_peak).stage == 3


def test_training_leaves_the_allocator_three_percent() -> None:
    found = plan(QWEN32)
    assert found.memory is not None
    peak, gpu = found.memory.training_peak, found.machine.device
    for share, is_refused in ((0.965, False), (0.975, True)):
        machine = Machine(replace(gpu, memory=int(peak / share)), 64)
        said = problems(found.config, found.workload, machine)
        assert any(problem.startswith("training is predicted to take") for problem in said) == is_refused, said


def test_an_engine_holds_one_sequence_or_is_refused() -> None:
    """Of Qwen2.5-32B over 4 ranks: keys and values of 64 layers, 2 heads of 128 and 10,240 tokens in bf16."""
    found = plan(QWEN32, "rollout.tp=4")
    machine = Machine(replace(DEVICES["cpu"], memory=1 << 50), 64)
    least = 2 * 64 * 2 * 128 * 2 * 10_240 // 2**20
    for mib, said in ((least, []), (least - 1, ["the engine's keys and values have 0.62 GiB"])):
        found.config.rollout.kv_cache_mib = mib
        refused = problems(found.config, found.workload, machine)
        assert [problem.partition(",")[0] for problem in refused] == said


def test_the_ranks_of_a_cpu_share_its_memory() -> None:
    assert Machine(replace(DEVICES["cpu"], memory=64 * GIB), 8).memory == 8 * GIB
    assert Machine(DEVICES["h100"], 8).memory == DEVICES["h100"].memory
