"""Every number of the flight recorder, anew from the step's weights: transformers in fp64, formulas by hand."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_rlvr.token_records import TokenRecord, read_record
from megatron_rlvr.weights.convert_export import export_megatron
from tests.models import reference

PROMPTS, RESPONSES, RHO, KAPPA, CLIP = 16, 16, 0.1, 0.02, 0.2
OPTIONS = [
    "exploration={lp_reg: {rho: 0.1}, cde: {}}",
    "reward.scale=signed",
    "optimizer.warmup_steps=0",
    "trainer.updates_per_rollout=2",
    "trainer.num_steps=1",
    f"logging.record_responses={PROMPTS * RESPONSES}",
]


@pytest.mark.slow
def test_every_number_is_that_of_the_steps_weights(train, countdown: Path, tmp_path: Path) -> None:
    """Two steps of two updates, tp 2; the weights between the updates are those of a run with half of the prompts."""
    run, half, parallel = tmp_path / "run", tmp_path / "half", tmp_path / "dp"
    train(*OPTIONS, f"run.dir={run}")
    shutil.copytree(run / "hf", tmp_path / "after_one")
    train(*OPTIONS, f"run.dir={run}", "trainer.num_steps=2", "run.resume=must")
    train(*OPTIONS, "rollout.prompts_per_step=8", "trainer.updates_per_rollout=1", f"run.dir={half}")
    train(*OPTIONS, "parallel.tp=1", "parallel.dp=2", f"run.dir={parallel}")

    tokenizer = AutoTokenizer.from_pretrained(countdown / "model")
    first, second = read_record(run, 1), read_record(run, 2)
    check(first, countdown / "model", half / "hf", tokenizer)
    check(second, tmp_path / "after_one", None, tokenizer)
    dealt_out = read_record(parallel, 1)
    assert [row["response"] for row in dealt_out.responses] == [row["response"] for row in first.responses]
    for name, column in first.columns.items():
        assert close(dealt_out.columns[name], column) < 1e-4, name  # another order of sums, through an update


def test_the_value_heads_are_those_of_the_critics_weights(train, countdown: Path, tmp_path: Path) -> None:
    """Mean and spread over the heads at every token, from the checkpoint before each step and transformers in fp64."""
    run = tmp_path / "run"
    options = [f"logging.record_responses={PROMPTS * RESPONSES}", "trainer.save_every=1", "critic.warmup_steps=1"]
    train(
        *options,
        "trainer.keep_last=3",
        "trainer.num_steps=3",
        f"run.dir={run}",
        config="examples/countdown_cpu/ppo.yaml",
    )
    tokenizer = AutoTokenizer.from_pretrained(countdown / "model")
    for step in (2, 3):
        critic, record = tmp_path / f"critic_{step}", read_record(run, step)
        export_megatron(run / f"checkpoints/step_{step - 1}", critic, "critic")
        values = values_of(record, critic, tokenizer)
        assert len(record.responses) == PROMPTS * RESPONSES and values.shape[1] == 4
        spread = ((values - values.mean(1, keepdim=True)) ** 2).mean(1).sqrt()
        assert close(record.columns["value"], values.mean(1)) < 1e-5
        assert close(record.columns["value_std"], spread) < 1e-5
        assert spread.min() > 1e-4  # heads that agree would hide a mistake


def values_of(record: TokenRecord, critic: Path, tokenizer) -> torch.Tensor:
    """[n, K] the critic's values of the states before each recorded token."""
    head, trunk, parts = load_file(critic / "value_head.safetensors"), reference.load(critic).model, []
    for row in record.responses:
        prompt = tokenizer.encode(row["prompt"])
        response = tokenizer.convert_tokens_to_ids(record.texts[row["start"] : row["stop"]])
        with torch.no_grad():
            hidden = trunk(torch.tensor([[*prompt, *response]])).last_hidden_state[0, len(prompt) - 1 : -1]
        parts.append(hidden @ head["weight"].double().T + head["bias"].double())
    return torch.cat(parts)


def check(record: TokenRecord, weights: Path, between: Path | None, tokenizer) -> None:
    """``between``: the weights after the first of two updates; without them only that update's ratios are known."""
    assert len(record.responses) == PROMPTS * RESPONSES
    old, rows = statistics(record, weights, tokenizer), record.responses
    for name in ("log_prob", "entropy", "rank", "kept", "kept_mass"):
        assert close(record.columns[name], old[name]) < 1e-5, name
    assert close(record.columns["rollout_log_prob"], old["log_prob"]) < 1e-5  # the engine's own fp32
    lengths = torch.tensor([row["stop"] - row["start"] for row in rows])
    bonus, advantage = shaped(record, old["log_prob"], lengths)
    assert close(record.columns["cde/bonus"], bonus.repeat_interleave(lengths)) < 1e-5
    assert close(record.columns["advantage"], advantage.repeat_interleave(lengths)) < 1e-5

    prompts = list(dict.fromkeys(row["prompt_id"] for row in rows))
    of_first = torch.tensor([prompts.index(row["prompt_id"]) < PROMPTS // 2 for row in rows]).repeat_interleave(lengths)
    selected = regularised(old, advantage.repeat_interleave(lengths), of_first)
    assert close(record.columns["lp_reg/selected"], selected) == 0 and selected.any()
    ratio = record.columns["ratio"].double()
    assert close(ratio[of_first], torch.ones_like(ratio[of_first])) < 1e-5
    if between is not None:
        expected = (statistics(record, between, tokenizer)["log_prob"] - old["log_prob"]).exp()
        assert close(ratio[~of_first], expected[~of_first]) < 1e-5
        assert (expected[~of_first] - 1).abs().max() > 0.05
    up = advantage.repeat_interleave(lengths) > 0
    clipped = torch.where(up, ratio > 1 + CLIP, ratio < 1 - CLIP) & (advantage.repeat_interleave(lengths) != 0)
    assert close(record.columns["clipped"], clipped) == 0


def statistics(record: TokenRecord, weights: Path, tokenizer) -> dict[str, torch.Tensor]:
    """[n] each, response by response from the whole sequence."""
    model, parts = reference.load(weights), []
    for row in record.responses:
        prompt = tokenizer.encode(row["prompt"])
        response = tokenizer.convert_tokens_to_ids(record.texts[row["start"] : row["stop"]])
        with torch.no_grad():
            log_p = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        at = torch.tensor(response)[:, None]
        log_prob = log_p.gather(1, at)
        is_kept = log_p >= math.log(KAPPA) + log_p.amax(-1, keepdim=True)
        parts.append(
            {
                "log_prob": log_prob[:, 0],
                "entropy": -(log_p.exp() * log_p).sum(-1),
                "rank": 1 + (log_p > log_prob).sum(-1).double(),
                "kept": is_kept.gather(1, at)[:, 0],
                "kept_mass": torch.where(is_kept, log_p.exp(), 0.0).sum(-1),
            }
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def shaped(record: TokenRecord, log_prob: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CDE's bonus and GRPO's advantage of each response, from rewards of -1 and 1."""
    rewards = torch.tensor([2 * row["reward"] - 1 for row in record.responses], dtype=torch.float64)
    surprise = torch.stack([-part.mean() for part in log_prob.split(lengths.tolist())])
    bonus = torch.minimum(rewards.abs() / 3, surprise)
    shaped, advantage = rewards + bonus, torch.zeros_like(rewards)
    prompts = [row["prompt_id"] for row in record.responses]
    for prompt in set(prompts):
        group = torch.tensor([other == prompt for other in prompts])
        advantage[group] = (shaped[group] - shaped[group].mean()) / (shaped[group].std() + 1e-6)
    return bonus, advantage


def regularised(old: dict[str, torch.Tensor], advantage: torch.Tensor, of_first: torch.Tensor) -> torch.Tensor:
    """Of each update: A < 0, among the lowest rho by probability, and kept by the filter."""
    selected = torch.zeros_like(of_first)
    for update in (of_first, ~of_first):
        limit = old["log_prob"][update].sort().values[math.ceil(RHO * int(update.sum())) - 1]
        selected |= update & (advantage < 0) & (old["log_prob"] <= limit + 1e-9) & old["kept"]
    return selected


def close(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative where a number is larger than 1; equal infinities differ by nothing."""
    found, expected = found.double(), expected.double()
    gap = torch.where(found == expected, 0.0, (found - expected).abs())
    return float((gap / expected.abs().clamp(min=1.0)).max())
