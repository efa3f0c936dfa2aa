from __future__ import annotations

from megatron_rlvr.seeds import stable_seed


def test_seeds_are_stable_and_unrelated():
    assert stable_seed(0, 12, "head", 3) == 8993334654180841687
    seeds = {stable_seed(run, step, "head", head) for run in range(4) for step in range(4) for head in range(16)}
    assert len(seeds) == 4 * 4 * 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stable_seed(1, 2) != stable_seed(12)
