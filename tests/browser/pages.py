"""What the browser is shown: real runs, a long run, and what a model would write to break a page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from megatron_rlvr.token_records import Recorded, Recording
from megatron_rlvr.types import Prompt, Rollout
from megatron_rlvr.verdict import Verdict
from tests.integration.conftest import CONFIG, DEADLINE, ROOT
from tests.pages.test_report import response, step_row, write_run

ATTACKS = ["<script>window.attacked=1</script>", "</textarea>", "</script><script>window.attacked=2</script>"]
ATTACKS += ["<img src=x onerror=window.attacked=3>", "&lt;b&gt;", "数学 ✓"]
LAST = 12  # steps of a real run
RUNS = {
    "lp_reg": (CONFIG, []),
    "grpo": (CONFIG, ["exploration=null"]),
    "ppo_cde": ("examples/countdown_cpu/ppo.yaml", ["exploration={cde: {critic: {}}}", "reward.scale=signed"]),
}


def real_runs(folder: Path) -> list[Path]:
    """A short run of each method, with a held-out measurement before and after."""
    for name, (config, overrides) in RUNS.items():
        common = [f"name={name}", f"run.dir={folder / name}", f"trainer.num_steps={LAST}", "trainer.eval_every=6"]
        common += ["trainer.eval_responses=2", "logging.tensorboard=false"]
        command = [sys.executable, "-m", "megatron_rlvr.train", config, *common, *overrides]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE)
        assert done.returncode == 0, done.stdout + done.stderr
    return [folder / name for name in RUNS]


def attacking_record() -> tuple[Recording, list[str]]:
    """Two responses, one of what would break a page, one of 1e5 characters; and the text of each token."""
    texts = [*ATTACKS, "\x00\x1b", "\u202eabc\u200f", "\n", "", "x"]
    long = [len(texts) - 1] * 100_000
    chosen, start = [], 0
    for index, ids in enumerate([list(range(len(texts) - 1)), long]):
        verdict = Verdict(1.0, "ok", extracted="".join(ATTACKS))
        rollout = Rollout(index, ids, [-1.0] * len(ids), "stop", 0, "".join(texts[token] for token in ids), verdict)
        prompt = Prompt("".join(ATTACKS), "".join(texts), (), "countdown", {"target": ATTACKS})
        chosen.append(Recorded(prompt, rollout, index, start, start + len(ids)))
        start += len(ids)
    columns = {name: torch.linspace(-3, 0, start) for name in ("log_prob", "entropy", ATTACKS[0])}
    return Recording(chosen, columns | {"kept": torch.ones(start, dtype=torch.bool)}), texts


def long_run(folder: Path) -> Path:
    rows = [step_row(step) for step in range(1, 501)]
    for step in range(1, 501, 50):
        rows[step - 1] |= {"eval/pass@1": step / 1000, "eval/pass@16": 0.7, "eval/distinct": 9.0}
        rows[step - 1] |= {"eval/aime24/pass@1": step / 2000, "eval/aime25/pass@1": step / 3000}
    return write_run(folder, rows, [response(step, step % 2, "".join(ATTACKS) * 400) for step in range(300, 501)])
