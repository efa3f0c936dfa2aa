"""Run each method of methods/ with several seeds on the countdown task, then write the table and the plots.

    python examples/compare_exploration/compare.py [--methods grpo lp_reg] [--seeds 0 1 2] [--steps 200] [--jobs 2]

A finished run leaves results/METHOD-SEED-STEPS.json and is not run again, so the comparison can be stopped and go on
another day; --report-only writes table and plots from what is there. Runs of other steps than --steps are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS, BUILD, README = HERE / "results", HERE / "build", HERE / "README.md"
DEADLINE = 3600.0  # seconds per run; three to eight minutes where two run at a time on two cores
SPAN = 10  # steps whose mean is one point of a curve
CURVES = ["reward/mean", "policy/entropy", "lp_reg/share", "rollout/perplexity_right", "rollout/perplexity_wrong"]
CURVES += ["critic/head_std", "critic/explained_variance"]
COLUMNS = {  # the last ones are there for some methods alone
    "eval/pass@1": "pass@1",
    "eval/pass@16": "pass@16",
    "eval/distinct": "different answers of 16",
    "eval/distinct_right": "different right answers of 16",
    "policy/entropy": "entropy, nats",
    "eval/ppl_right": "perplexity of right answers",
    "eval/ppl_wrong": "perplexity of wrong answers",
    "lp_reg/share": "regularised share",
    "eval/head_std": "disagreement of heads",
}
HELD_OUT = ("eval/pass@1", "eval/pass@16", "eval/distinct_right")  # one panel each
# Curves by step, one panel each behind the held-out figures.
PANELS = {
    "policy/entropy": "entropy, nats",
    "lp_reg/share": "regularised share",
    "rollout/perplexity_right": "perplexity of right answers",
    "rollout/perplexity_wrong": "perplexity of wrong answers",
    "critic/head_std": "disagreement of the critic's heads",
}
# Student's t at 97.5 % for n - 1 degrees of freedom: half a 95 % interval in standard errors of a mean of n seeds.
T_975 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
START, END = "<!-- table: written by compare.py -->", "<!-- end of table -->"


def main() -> int:
    known = sorted(path.stem for path in (HERE / "methods").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="METHOD", help=", ".join(known))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at a time (one core each)"
    )
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.report_only:
        run_all(options)
    return report(options.steps)


def run_all(options: argparse.Namespace) -> None:
    """Every run that has no result yet. Raises RuntimeError, with the end of its output, where one fails."""
    subprocess.run([sys.executable, "examples/countdown_cpu/prepare.py"], cwd=ROOT, check=True, timeout=DEADLINE)
    # seed by seed, so that a comparison that is stopped early holds every method
    todo = [
        (method, seed)
        for seed, method in product(options.seeds, options.methods)
        if not result_path(method, seed, options.steps).exists()
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        for number, (method, seed, seconds) in enumerate(
            pool.map(lambda one: run_one(one[0], one[1], options.steps), todo), start=1
        ):
            print(f"{number}/{len(todo)}  {method} seed {seed}: {seconds:.0f} s", flush=True)


def result_path(method: str, seed: int, steps: int) -> Path:
    return RESULTS / f"{method}-{seed}-{steps}.json"


def run_one(method: str, seed: int, steps: int) -> tuple[str, int, float]:
    folder, started = BUILD / f"{method}-{seed}", time.monotonic()
    settings = [f"seed={seed}", f"trainer.num_steps={steps}", f"run.dir={folder}", "run.overwrite=true"]
    command = [sys.executable, "-m", "megatron_rlvr.train", str(HERE / "methods" / f"{method}.yaml"), *settings]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=DEADLINE,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(f"{method} seed {seed} ended with exit code {ended.returncode}:\n{ended.stdout[-3000:]}")
    seconds = time.monotonic() - started
    RESULTS.mkdir(exist_ok=True)
    figures = {"method": method, "seed": seed, "steps": steps, "seconds": round(seconds), **summary(folder)}
    unfinished = result_path(method, seed, steps).with_suffix(".tmp")
    unfinished.write_text(json.dumps(figures) + "\n")
    unfinished.rename(result_path(method, seed, steps))
    return method, seed, seconds


def summary(folder: Path) -> dict[str, Any]:
    """A run's last figures, its held-out figures by step, and its curves in means of SPAN steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = json.loads((folder / "summary.json").read_text())
    held_out = [
        {"step": row["step"] - 1} | {name: value for name, value in row.items() if name.startswith("eval/")}
        for row in rows
        if "eval/pass@1" in row
    ]
    final = {name: value for name, value in last.items() if name.startswith("eval/")}
    spans = [rows[start : start + SPAN] for start in range(0, len(rows), SPAN)]
    curves = {
        name: [round(mean(row[name] for row in span if name in row), 5) for span in spans]
        for name in CURVES
        if all(any(name in row for row in span) for span in spans)
    }
    final |= {name: curves[name][-1] for name in COLUMNS if name in curves}
    return {"final": final, "held_out": [*held_out, {"step": len(rows), **final}], "curves": curves}


def report(steps: int) -> int:
    """The table into the README, the plots beside it. Returns the exit code."""
    by_method: dict[str, list[dict]] = defaultdict(list)
    for path in sorted(RESULTS.glob(f"*-{steps}.json")):
        result = json.loads(path.read_text())
        by_method[result["method"]].append(result)
    if not by_method:
        print(f"there is no result of {steps} steps in {RESULTS}", file=sys.stderr)
        return 1
    before, _, rest = README.read_text().partition(START)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{START}\n{table(by_method, steps)}\n{END}{after}")
    plot(by_method)
    print(table(by_method, steps))
    return 0


def table(by_method: dict[str, list[dict]], steps: int) -> str:
    """Markdown: the mean over seeds after the last step, and half of its 95 % interval."""
    lines = [f"After {steps} steps; mean over seeds ± half a 95 % interval (Student's t).\n"]
    lines.append("| method | seeds | " + " | ".join(COLUMNS.values()) + " |")
    lines.append("|---|---|" + "---|" * len(COLUMNS))
    for method, results in sorted(
        by_method.items(), key=lambda item: -mean(run["final"]["eval/pass@1"] for run in item[1])
    ):
        cells = [interval([run["final"][name] for run in results if name in run["final"]]) for name in COLUMNS]
        lines.append(f"| {method} | {len(results)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "–"
    return f"{mean(values):.3f} ± {T_975[min(len(values), 10)] * stdev(values) / math.sqrt(len(values)):.3f}"


def plot(by_method: dict[str, list[dict]]) -> None:
    """curves.svg and curves.png: held-out figures and curves by step, mean over seeds and their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 4, figsize=(20, 8), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    for place, (method, results) in enumerate(sorted(by_method.items())):
        style = {"color": colours[place % 20]}
        for panel, name in zip(panels.flat, HELD_OUT, strict=False):
            steps = [point["step"] for point in results[0]["held_out"]]
            draw(panel, steps, [[point[name] for point in run["held_out"]] for run in results], method, style)
        for panel, name in zip(panels.flat[3:], PANELS, strict=True):
            curves = [run["curves"][name] for run in results if name in run["curves"]]
            if curves:  # a method's own figures are there for its own runs
                draw(panel, [SPAN * (index + 1) for index in range(len(curves[0]))], curves, method, style)
    for panel, title in zip(panels.flat, [*(COLUMNS[name] for name in HELD_OUT), *PANELS.values()], strict=True):
        panel.set(title=title, xlabel="step")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    for suffix in ("svg", "png"):
        figure.savefig(HERE / f"curves.{suffix}", dpi=60)


def draw(panel: Any, steps: list[int], runs: list[list[float]], label: str, style: dict) -> None:
    by_step = list(zip(*runs, strict=True))
    panel.plot(steps, [mean(values) for values in by_step], label=label, **style)
    panel.fill_between(
        steps, [min(values) for values in by_step], [max(values) for values in by_step], alpha=0.12, **style
    )


if __name__ == "__main__":
    sys.exit(main())
