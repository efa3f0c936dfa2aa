"""What a step's program refuses to measure; the whole of it runs in integration/."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_rlvr.config import Config
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.trainer import Trainer
from megatron_rlvr.types import Batch
from megatron_rlvr.verifiers import VerifierError
from tests.ranks import run_ranks
from tests.test_evaluation import group


def test_held_out_figures_of_a_failing_verifier_are_none() -> None:
    """They would be of the right answers alone, and keep_best would keep what they flatter."""
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.critic, trainer.policy_version = Config(), None, 0
    trainer.held_out = {"a": SimpleNamespace(prompts=[])}
    for groups in ([group(1.0, None)], [group(*[1.0] * 9, None)]):
        trainer.collector = SimpleNamespace(collect=lambda *_, groups=groups, **__: SimpleNamespace(groups=groups))
        if len(groups[0].rollouts) == 2:
            with pytest.raises(VerifierError, match="1 of 2 responses .* reward.max_error_share=0.1"):
                trainer.evaluate()
        else:
            assert trainer.evaluate()["eval/unjudged"] == pytest.approx(0.1)


@pytest.mark.parametrize("prompts", [1, 5])
def test_a_critics_held_out_figures_are_those_of_all_prompts_whatever_the_ranks(prompts: int) -> None:
    """Its two heads say 1/2 less and 1/2 more than a third of the tokens read; 5 prompts are no multiple of 2 or 3."""

    def fill_values(batch: Batch) -> None:
        values = batch.position_ids[:, None] / 3 + torch.tensor([-0.5, 0.5])
        batch.values = torch.where(batch.loss_mask[:, None], values, 0.0)

    def work() -> dict[str, float]:
        trainer = Trainer.__new__(Trainer)
        trainer.config = Config()
        trainer.config.critic.num_heads = 2
        trainer.groups = ParallelGroups.from_grid(dp=torch.distributed.get_world_size())
        trainer.critic = SimpleNamespace(fill_values=fill_values)
        return trainer.held_out_values([group(float(row == 2), 1.0, None, 0.0) for row in range(prompts)])

    # Responses of 1, 2 and 4 tokens in each prompt, each token's return the reward that its response earns.
    tokens = [
        (reward, place / 3)
        for row in range(prompts)
        for length, reward in ((1, float(row == 2)), (2, 1.0), (4, 0.0))
        for place in range(length)
    ]
    returns, values = torch.tensor(tokens, dtype=torch.float64).unbind(1)
    explained = 1 - float((returns - values).var() / returns.var())
    for ranks in (1, 2, 3):
        for figures in run_ranks(ranks, work):
            assert figures == pytest.approx({"head_std": 0.5, "explained_variance": explained}, rel=1e-5), ranks
