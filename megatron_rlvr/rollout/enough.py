"""Goes on sampling until a method that turns groups away has left enough of them (DAPO, arXiv 2503.14476 Sec 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_rlvr import verifiers
from megatron_rlvr.rollout_metrics import rollout_metrics
from megatron_rlvr.types import RolloutGroup

MOST_GENERATIONS = 10  # of a step


@dataclass
class Sampled:
    """What one step sampled, in the order of its prompts."""

    groups: list[RolloutGroup] = field(default_factory=list)
    kept: list[RolloutGroup] = field(default_factory=list)  # those that train
    turned_away: int = 0  # groups; more are left out where more were kept than asked for
    generations: int = 0

    def metrics(self) -> dict[str, float]:
        """Figures of everything sampled, for what is kept alone says less and less about the policy."""
        return {
            **rollout_metrics(self.groups),
            "rollout/kept_share": 1 - self.turned_away / len(self.groups),
            "rollout/generations": float(self.generations),
        }


def sample(
    wanted: int,
    collect: Callable[[int, int], list[RolloutGroup]],
    keep: Callable[[RolloutGroup], bool],
    max_error_share: float,
) -> Sampled:
    """``wanted`` kept groups out of those that ``collect(number of prompts, generation)`` brings.

    A later generation asks for twice as many as are expected to be needed, ``wanted`` at the most: a generation takes
    as long as its longest response, so that one too many costs more than some groups too many, which are dropped.
    Raises VerifierError where too many of the verdicts so far are failures, RuntimeError where MOST_GENERATIONS are not
    enough.
    """
    sampled, asked = Sampled(), wanted
    while sampled.generations < MOST_GENERATIONS:
        groups = collect(asked, sampled.generations)
        sampled.generations += 1
        sampled.groups += groups
        verdicts = [rollout.verdict for group in sampled.groups for rollout in group.rollouts]
        verifiers.check_error_share(verdicts, max_error_share)
        kept = [group for group in groups if keep(group)]
        sampled.kept += kept
        sampled.turned_away += len(groups) - len(kept)
        missing = wanted - len(sampled.kept)
        if missing <= 0:
            del sampled.kept[wanted:]
            return sampled
        asked = min(wanted, math.ceil(2 * missing * len(sampled.groups) / max(1, len(sampled.kept))))
    raise RuntimeError(
        f"after {sampled.generations} generations only {len(sampled.kept)} of {wanted} groups were kept, out of "
        f"{len(sampled.groups)}: the exploration method turns away too many, for example because all are solved or "
        f"none is. Take prompts nearer to what the model can do, more responses to each, or another method"
    )
