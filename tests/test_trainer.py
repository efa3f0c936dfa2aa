"""What a step's program refuses to measure; the whole of it runs in integration/."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_rlvr.config import Config
from megatron_rlvr.trainer import Trainer
from megatron_rlvr.verifiers import VerifierError
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
