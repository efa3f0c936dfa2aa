"""Whether the nodes of a job are fit to train: python -m megatron_rlvr.launch.health RUN_DIR [--device gpu]

Runs as one process per rank, ahead of the run, and takes some seconds. Every rank looks at its own machine and leaves
what it sees with the first rank, which compares: GPU, disk, versions; only then they meet in collectives, for clocks
and bandwidth. What is wrong is named with its node, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_rlvr import watchdog
from megatron_rlvr.environment import versions
from megatron_rlvr.processes import leave

PATIENCE = 120.0  # seconds for a rank to come, and for a collective to end
STACKS = Path("logs", "health")  # of ranks that stood still in the check itself
LEAST_FREE = 10 << 30  # bytes on the disk of the run's folder
CLOCK_SKEW = 5.0  # seconds between a node and the others; files and logs of the run are compared by time
SLOW = 0.5  # of the median bandwidth of the other nodes


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the nodes of a job before it trains.")
    parser.add_argument("folder", type=Path, help="the run's folder, which all nodes share")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu", help="what every rank must have")
    options = parser.parse_args()
    from megatron_rlvr.distributed.node_check import Meeting

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    token = options.folder / f".health_{os.environ['MASTER_PORT']}"
    meeting = Meeting(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank, ranks, PATIENCE)
    meeting.leave_note(json.dumps(look(options.folder)))
    if rank == 0:
        watchdog.clear(options.folder / STACKS)
        reports = {came: json.loads(note) for came, note in meeting.notes().items()}
        token.write_text("every node must see this file")
        meeting.say(json.dumps({"faults": local_faults(reports, ranks, options.device), "nodes": _nodes(reports)}))
    verdict = json.loads(meeting.hear())
    if rank == 0:
        meeting.part(len(verdict["nodes"]))
    faults = verdict["faults"] or _together(meeting, verdict["nodes"], token, options)
    if rank == 0:
        token.unlink()
        print(*[f"unfit: {fault}" for fault in faults] or [f"{ranks} ranks are fit to train"], sep="\n", flush=True)
    return 1 if faults and rank == 0 else 0  # another rank that failed sooner would end this one before it has spoken


def look(folder: Path) -> dict[str, Any]:
    """What this rank sees of its own machine."""
    from megatron_rlvr import platform

    report: dict[str, Any] = {"node": os.environ.get("SLURMD_NODENAME") or os.uname().nodename}
    report["gpus"], report["local_rank"] = platform.gpus(), int(os.environ.get("LOCAL_RANK", 0))
    report["versions"] = versions()
    probe = folder / f".disk_{os.environ['RANK']}"
    try:
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
        report["free"], report["disk"] = shutil.disk_usage(folder).free, ""
    except OSError as error:
        report["free"], report["disk"] = 0, error.strerror or str(error)
    return report


def local_faults(reports: dict[int, dict[str, Any]], ranks: int, device: str) -> list[str]:
    """What is wrong with single machines, a line each; ``reports`` holds what ``look`` returned, by rank."""
    faults = []
    absent = [rank for rank in range(ranks) if rank not in reports]
    if absent:
        faults.append(f"ranks {absent} did not come within {PATIENCE:g} s; those on {_nodes(reports)} did")
    usual = _usual_versions(list(reports.values()))
    for rank, report in sorted(reports.items()):
        here = f"node {report['node']}, rank {rank}"
        if device == "gpu" and report["local_rank"] >= report["gpus"]:
            faults.append(f"{here}: no GPU for local rank {report['local_rank']}; {report['gpus']} are visible")
        if report["disk"]:
            faults.append(f"{here}: cannot write to the run's folder: {report['disk']}")
        elif report["free"] < LEAST_FREE:
            faults.append(f"{here}: {report['free'] / 1e9:.1f} GB left where the run writes, of {LEAST_FREE / 1e9:.1f}")
        for name in sorted(usual.keys() | report["versions"].keys()):
            mine, others = report["versions"].get(name, "none"), usual.get(name, "none")
            if mine != others:
                faults.append(f"{here}: {name} {mine}, but {others} on most ranks")
    return faults


def shared_faults(reports: list[dict[str, Any]]) -> list[str]:
    """What is wrong with a node beside the others: by rank, {"node", "clock", "shared", "bandwidths"}."""
    faults = []
    first = {report["node"]: report for report in reversed(reports)}  # one rank speaks for its node
    usual = statistics.median(report["clock"] for report in reports)
    for node, report in reversed(first.items()):
        if not report["shared"]:
            faults.append(f"node {node}: the run's folder is not the one that rank 0 sees: set run.dir to a shared one")
        if abs(report["clock"] - usual) > CLOCK_SKEW:
            faults.append(f"node {node}: its clock is {report['clock'] - usual:+.1f} s from the others'")
    measured = {ring: speed for report in reports for ring, speed in report["bandwidths"].items()}
    for kind in (0, 1):  # within nodes, between neighbours
        speeds = {ring: speed for ring, speed in measured.items() if ring.count("+") == kind}
        slow = [ring for ring in speeds if speeds[ring] < SLOW * statistics.median(speeds.values())]
        guilty = Counter(node for ring in slow for node in ring.split("+"))
        for node, times in guilty.items():
            if times == 1 + kind:  # both links of a node, or else the neighbour is to blame
                found = ", ".join(f"{speeds[ring]:.2f} GB/s on {ring}" for ring in slow if node in ring.split("+"))
                faults.append(f"node {node}: {found}; the median is {statistics.median(speeds.values()):.2f} GB/s")
    return faults


def _together(meeting: Any, nodes: list[str], token: Path, options: argparse.Namespace) -> list[str]:
    """The checks that take collectives; every rank gets the same list."""
    from megatron_rlvr import platform
    from megatron_rlvr.distributed import node_check
    from megatron_rlvr.distributed.reduce import gather_objects

    platform.start_rank()
    watchdog.watch(options.folder / STACKS, meeting.rank, meeting.ranks, PATIENCE)
    group = meeting.join(platform.backend())
    report = {"node": nodes[meeting.rank], "shared": token.exists(), "clock": node_check.clock()}
    report["bandwidths"] = node_check.bandwidths(nodes, platform.device())
    reports = gather_objects(report, group)
    if meeting.rank == 0:
        for ring, speed in {ring: speed for item in reports for ring, speed in item["bandwidths"].items()}.items():
            print(f"all-reduce on {ring}: {speed:.2f} GB/s", flush=True)
    return shared_faults(reports)


def _nodes(reports: dict[int, dict[str, Any]]) -> list[str]:
    return [report["node"] for _, report in sorted(reports.items())]


def _usual_versions(reports: list[dict[str, Any]]) -> dict[str, str]:
    """The version of each package that most ranks have."""
    names = {name for report in reports for name in report["versions"]}
    counts = {name: Counter(report["versions"].get(name, "none") for report in reports) for name in names}
    return {name: count.most_common(1)[0][0] for name, count in counts.items()}


if __name__ == "__main__":
    leave(main())
