"""Benchmark problems in training sets: python tools/decontaminate.py TRAIN [TRAIN ...] --report REPORT.json"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from megatron_rlvr.benchmarks import BENCHMARKS, find
from megatron_rlvr.config import ConfigError, SourceConfig
from megatron_rlvr.decontamination import check, index_benchmarks
from megatron_rlvr.prompt_files import source_name


def main() -> int:
    local = [name for name, item in BENCHMARKS.items() if item.file]
    parser = argparse.ArgumentParser(description="Exits with 1 where a training set holds problems of a benchmark.")
    parser.add_argument("train", nargs="+", metavar="TRAIN", help="a training set, as in data.path")
    parser.add_argument("--benchmarks", default=",".join(local), help="with commas (default: %(default)s)")
    parser.add_argument("--data", default="", help="folder of the benchmarks' files; without it they come from the hub")
    parser.add_argument("--prompt-field", default="", help="of TRAIN, where it is not found by itself")
    parser.add_argument("--benchmark-field", default="", help="the same, of benchmarks that are files of your own")
    parser.add_argument("--report", required=True, help="JSON file that names every match")
    parser.add_argument("--ngram", type=int, default=13, help="words of an n-gram (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.5, help="of a problem's n-grams (default: %(default)s)")
    parser.add_argument("--clean", help="jsonl file for the rows of the one TRAIN that match nothing")
    asked = parser.parse_args()
    if asked.clean and len(asked.train) > 1:
        parser.error("--clean takes one TRAIN: the rows of several need not have the same fields")
    if asked.ngram < 1 or not 0 < asked.share <= 1:
        parser.error("--ngram must be at least 1, and --share in (0, 1]")
    for file in filter(None, (asked.report, asked.clean)):
        if not Path(file).absolute().parent.is_dir():  # said before a search of minutes
            parser.error(f"{Path(file).absolute().parent}, where {Path(file).name} is to be written, is no folder")
    files = [Path(file).resolve() for file in (*asked.train, asked.report, asked.clean) if file]
    if len(set(files)) < len(files):
        parser.error("TRAIN, --report and --clean must be different files: one would replace another")
    try:
        names = asked.benchmarks.split(",")
        benchmarks = [find(name, prompt_field=asked.benchmark_field) for name in names]
        index, texts = index_benchmarks(benchmarks, asked.data, asked.ngram)
        trains = [SourceConfig(path, prompt_field=asked.prompt_field) for path in asked.train]
        results = {train.path: check(train, index, asked.share) for train in trains}
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = []
    for path, (clean, found) in results.items():
        exact = Counter(match.problem.partition("/")[0] for row in found for match in row.matches if match.exact)
        near = Counter(match.problem.partition("/")[0] for row in found for match in row.matches if not match.exact)
        print(f"{source_name(path)}: {len(found)} of {len(clean) + len(found)} rows hold benchmark problems")
        for name in sorted(exact | near):
            print(f"  {name}: {exact[name]} the same, {near[name]} with {asked.share:.0%} or more of the n-grams")
        for row in found:
            for match in row.matches:
                shown = {"text": row.question, "problem_text": texts[match.problem]} if match.problem in texts else {}
                report.append({"row": row.row, **match._asdict(), **shown})
    Path(asked.report).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")
    if asked.clean:
        ((clean, _),) = results.values()
        rows = [row.row for row in clean if isinstance(row.row, dict)]
        if len(rows) < len(clean):
            print(f"{asked.clean}: rows that cannot be read and are left out: {len(clean) - len(rows)}")
        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]  # a date as text
        Path(asked.clean).write_text("".join(lines), "utf-8", "backslashreplace")
    return 1 if report else 0


if __name__ == "__main__":
    sys.exit(main())
