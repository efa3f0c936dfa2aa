"""What the node check finds, and whom it blames: the judgement on made-up reports, the measuring on real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_rlvr.distributed.node_check import Meeting, bandwidths, clock
from megatron_rlvr.launch.health import local_faults, look, shared_faults
from megatron_rlvr.processes import free_port
from tests.ranks import run_ranks

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "vllm": "0.32.0"}


def report(rank: int, **change: Any) -> dict[str, Any]:
    machine = {"node": f"n{rank // 2}", "gpus": 2, "local_rank": rank % 2, "free": 1 << 40, "disk": ""}
    return {"versions": VERSIONS} | machine | change


def reports(**changes: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Six ranks on three nodes; ``changes`` by rank: r4={"gpus": 0}."""
    return {rank: report(rank, **changes.get(f"r{rank}", {})) for rank in range(6)}


def test_good_nodes_have_no_faults() -> None:
    assert local_faults(reports(), 6, "gpu") == []
    assert local_faults(reports(r0={"gpus": 0}), 6, "cpu") == []


def test_each_fault_names_its_node() -> None:
    other = VERSIONS | {"torch": "2.12.0"}
    cases = {
        "node n2, rank 4: no GPU for local rank 0; 0 are visible": {"r4": {"gpus": 0}},
        "node n2, rank 5: no GPU for local rank 1; 1 are visible": {"r4": {"gpus": 1}, "r5": {"gpus": 1}},
        "node n1, rank 3: cannot write to the run's folder: Read-only file system": {
            "r3": {"disk": "Read-only file system", "free": 0}
        },
        "node n0, rank 1: 1.0 GB left where the run writes, of 10.7": {"r1": {"free": 10**9}},
        "node n2, rank 5: torch 2.12.0, but 2.13.0 on most ranks": {"r5": {"versions": other}},
        "node n0, rank 0: vllm none, but 0.32.0 on most ranks": {
            "r0": {"versions": {name: version for name, version in VERSIONS.items() if name != "vllm"}}
        },
        "node n2, rank 5: triton 3.7, but none on most ranks": {"r5": {"versions": VERSIONS | {"triton": "3.7"}}},
    }
    for fault, change in cases.items():
        assert local_faults(reports(**change), 6, "gpu") == [fault]


def test_ranks_that_never_came_are_named() -> None:
    came = {rank: item for rank, item in reports().items() if rank < 4}
    (fault,) = local_faults(came, 6, "gpu")
    assert "ranks [4, 5] did not come" in fault and "n0" in fault and "n2" not in fault


def beside(node: str, **change: Any) -> dict[str, Any]:
    return {"node": node, "shared": True, "clock": 1000.0, "bandwidths": {}} | change


def ring(within: dict[str, float], between: dict[str, float]) -> list[dict[str, Any]]:
    return [beside(node, bandwidths={node: speed} | between) for node, speed in within.items()]


def test_a_clock_that_is_wrong_and_a_folder_that_is_not_shared() -> None:
    three = [beside("n0"), beside("n1", clock=1007.5, shared=False), beside("n2")]
    folder, skew = shared_faults(three)
    assert folder.startswith("node n1: the run's folder is not the one") and "run.dir" in folder
    assert skew == "node n1: its clock is +7.5 s from the others'"
    assert shared_faults([beside("n0"), beside("n1", clock=992.5), beside("n2")]) == [skew.replace("+", "-")]
    assert shared_faults([beside("n0"), beside("n1", clock=1002.0)]) == []


def test_a_slow_node_is_blamed_and_its_neighbours_are_not() -> None:
    within = {f"n{node}": 100.0 for node in range(5)}
    between = {f"n{node}+n{(node + 1) % 5}": 40.0 for node in range(5)}
    assert shared_faults(ring(within, between)) == []
    (fault,) = shared_faults(ring(within | {"n3": 30.0}, between))
    assert fault == "node n3: 30.00 GB/s on n3; the median is 100.00 GB/s"
    (fault,) = shared_faults(ring(within, between | {"n1+n2": 5.0, "n2+n3": 6.0}))
    assert fault == "node n2: 5.00 GB/s on n1+n2, 6.00 GB/s on n2+n3; the median is 40.00 GB/s"


def measure() -> tuple[dict[str, float], float]:
    return bandwidths(["a", "a", "b"], torch.device("cpu")), clock()


def test_every_ring_is_measured_by_those_in_it() -> None:
    (first, now), (_, second_now), (third, _) = run_ranks(3, measure)
    assert set(first) == {"a", "a+b"} and set(third) == {"a+b"}, "a node of one rank has nothing to measure"
    assert all(speed > 0 for speed in first.values())
    assert abs(now - second_now) < 1.0


def meet(port: int, absent: int) -> tuple[dict[int, str], str]:
    import torch.distributed as dist

    rank = dist.get_rank()
    meeting = Meeting("127.0.0.1", port, rank, 3, patience=3.0)
    if rank == absent:
        return {}, ""
    meeting.leave_note(f"from {rank}")
    notes = meeting.notes() if rank == 0 else {}
    if rank == 0:
        meeting.say(json.dumps(sorted(notes)))
    verdict = meeting.hear()
    if rank == 0:
        meeting.part(len(notes))
    return notes, verdict


def test_whoever_does_not_come_is_missed_and_nobody_else() -> None:
    (notes, verdict), _, (_, heard) = run_ranks(3, meet, free_port(), 1)
    assert notes == {0: "from 0", 2: "from 2"}
    assert verdict == heard == "[0, 2]"


def test_a_rank_sees_its_own_machine(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    seen = look(tmp_path)
    assert seen["node"] == "n7" and seen["local_rank"] == 3 and seen["gpus"] == torch.cuda.device_count()
    assert seen["disk"] == "" and seen["free"] > 0 and seen["versions"]["torch"]
    assert look(tmp_path / "absent")["disk"] == "No such file or directory"
    assert list(tmp_path.iterdir()) == []


def test_the_check_of_a_job_that_is_unfit_fails_and_leaves_nothing(tmp_path: Path) -> None:
    place = {"RANK": "0", "LOCAL_RANK": "99", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    check = subprocess.run(
        [sys.executable, "-m", "megatron_rlvr.launch.health", str(tmp_path)],
        env=os.environ | place | {"MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert check.returncode == 1 and "rank 0: no GPU for local rank 99" in check.stdout, check.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
