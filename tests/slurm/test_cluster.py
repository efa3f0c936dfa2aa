"""The Slurm of the tests is a real one: jobs run on several nodes, wait for one another, are preempted and requeued."""

from __future__ import annotations

import pytest

from tests.slurm.conftest import Cluster

pytestmark = pytest.mark.slurm


def test_a_job_runs_on_several_nodes_and_after_another(cluster: Cluster, tmp_path) -> None:
    first = cluster.shell("sbatch --parsable -o /dev/null --wrap 'sleep 1'").strip()
    options = f"-o /dev/null -N 2 --ntasks-per-node=2 --gpus-per-node=8 -d afterok:{first}"
    second = cluster.shell(
        f"sbatch --parsable {options} --wrap 'srun --output={tmp_path}/%t printenv SLURMD_NODENAME'"
    ).strip()
    assert cluster.wait(second, deadline=60)["JobState"] == "COMPLETED"
    nodes = [(tmp_path / str(rank)).read_text().strip() for rank in range(4)]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]


def test_an_urgent_job_takes_the_place_of_another(cluster: Cluster) -> None:
    victim = cluster.shell("sbatch --parsable -o /dev/null -N 8 --exclusive --requeue --wrap 'sleep 300'").strip()
    cluster.wait(victim, "RUNNING", deadline=30)
    urgent = cluster.shell("sbatch --parsable -o /dev/null -p urgent --exclusive -N 1 --wrap true").strip()
    assert cluster.wait(urgent, deadline=60)["JobState"] == "COMPLETED"
    assert cluster.wait(victim, "PENDING", "RUNNING", deadline=30)["Restarts"] == "1"
    cluster.shell(f"scancel {victim}")
