"""What a step's responses and verdicts come to, before anything is trained on them."""

from __future__ import annotations

import math

import torch

from megatron_rlvr import verifiers
from megatron_rlvr.types import Rollout, RolloutGroup
from megatron_rlvr.verdict import is_right


def rollout_metrics(groups: list[RolloutGroup]) -> dict[str, float]:
    """reward/*, tokens/*, verifier/* and rollout/*, over every response of the step.

    Rewards are as the verifier gives them; reward/right_share is of all responses, judged or not.
    reward/always_right_share and never_right_share are of prompts: all of their judged responses are right, or none.
    There a group has nothing to compare, and its advantages are 0 unless a method shapes the rewards.
    rollout/perplexity_right and _wrong are means over responses of exp(-mean_t ln p(o_t)), as sampled;
    rollout/calibration_gap is wrong less right (CDE, arXiv 2509.09675v1, Fig 9). Each is left out where there is no
    such response.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scored = [rollout for rollout in rollouts if verifiers.is_scored(rollout.verdict)]
    rewards = torch.tensor([rollout.verdict.reward for rollout in scored])
    lengths = torch.tensor([float(len(rollout.response_ids)) for rollout in rollouts])
    statuses = verifiers.count_statuses([rollout.verdict for rollout in rollouts])
    return {
        "reward/mean": float(rewards.mean()) if rewards.numel() else float("nan"),
        "reward/std": float(rewards.std(correction=0)) if rewards.numel() else float("nan"),
        "reward/right_share": sum(is_right(rollout.verdict) is True for rollout in rollouts) / len(rollouts),
        "tokens/response_mean": float(lengths.mean()),
        "tokens/response_max": float(lengths.max()),
        "rollout/truncated_share": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        **{f"verifier/{status}_share": count / len(rollouts) for status, count in statuses.items()},
        **_one_kind(groups),
        **_calibration(scored),
    }


def _one_kind(groups: list[RolloutGroup]) -> dict[str, float]:
    kinds = [{is_right(rollout.verdict) for rollout in group.rollouts} - {None} for group in groups]
    judged = [kind for kind in kinds if kind]
    shares = {"always": [kind == {True} for kind in judged], "never": [kind == {False} for kind in judged]}
    return {f"reward/{name}_right_share": sum(of) / len(of) for name, of in shares.items() if of}


def _calibration(scored: list[Rollout]) -> dict[str, float]:
    right = [perplexity(rollout) for rollout in scored if is_right(rollout.verdict)]
    wrong = [perplexity(rollout) for rollout in scored if not is_right(rollout.verdict)]
    figures = {}
    if right:
        figures["rollout/perplexity_right"] = sum(right) / len(right)
    if wrong:
        figures["rollout/perplexity_wrong"] = sum(wrong) / len(wrong)
    if right and wrong:
        figures["rollout/calibration_gap"] = figures["rollout/perplexity_wrong"] - figures["rollout/perplexity_right"]
    return figures


def perplexity(rollout: Rollout) -> float:
    """exp of the mean negative log-prob of its tokens; 1 for a response without any."""
    return math.exp(-sum(rollout.rollout_log_probs) / max(1, len(rollout.response_ids)))
