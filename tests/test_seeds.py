from __future__ import annotations

from megatron_rlvr.seeds import stable_seed


def test_seeds_are_stable_and_unrelated():
    assert stable_seed(0, 12, "head", 3) == 8993334654180841687
    seeds = {stable_seed(run, step, "head", head) for run in range(4) for step in range(4) for head in range(16)}
    assert len(seeds) == 4 * 4 * 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stable_seed(1, 2) != stable_seed(12)


def test_the_seeds_of_samples_stay_what_they_were_and_differ():
    """Of (run, step, attempt, prompt, sample): a resumed run draws as the one before it would have."""
    assert stable_seed(0, 1, 0, "train/17", 3) == 4695901300345555133
    seeds = {
        stable_seed(run, step, attempt, prompt, sample)
        for run in range(2)
        for step in range(-1, 4)
        for attempt in range(2)
        for prompt in ("a", "b", "a1")
        for sample in range(11)
    }
    assert len(seeds) == 2 * 5 * 2 * 3 * 11
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(seeds)  # the CPU generator uses the lower half
