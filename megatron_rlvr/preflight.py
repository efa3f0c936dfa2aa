"""What can be refused before any rank starts: seconds in one process instead of minutes in all of them."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

from megatron_rlvr import trackers, verifiers
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config, SourceConfig, rule
from megatron_rlvr.exploration.base import build as build_exploration
from megatron_rlvr.processes import port_in_use
from megatron_rlvr.prompt_files import is_hub, source_name, stem
from megatron_rlvr.verifiers.combination import terms


def prepare(config: Config) -> None:
    """Run the config's ``prepare`` script where its model is still missing. Raises ConfigError when it fails."""
    if not config.prepare or Path(config.model.path).exists():
        return
    rule(Path(config.prepare).is_file(), f"prepare={config.prepare}: there is no such script")
    print(f"{config.model.path} is not there yet: running {config.prepare}", flush=True)
    code = subprocess.run([sys.executable, config.prepare], check=False).returncode
    rule(code == 0, f"{config.prepare} ended with exit code {code}; see its message above")


def check(config: Config) -> None:
    """Model, layout, verifier, methods, data, trackers and port. Raises ConfigError."""
    architecture = Architecture.from_folder(config.model.path)
    architecture.check_trains()
    architecture.check_layout(config.parallel.tp, config.parallel.pp, config.parallel.vpp, config.parallel.cp)
    architecture.check_engine_layout(config.rollout_tp)
    architecture.check_length(config.longest)
    verifiers.check_host(verifiers.load(config.verifier))
    _check_scale(config)
    exploration = build_exploration(config.exploration, config)
    _check_critic(config, architecture, exploration.needs().value_heads)
    data = config.data
    train, held_out = ("sources" if data.sources else "path"), ("eval_sources" if data.eval_sources else "eval_path")
    for name, sources in ((f"data.{train}", data.train_sources), (f"data.{held_out}", data.held_out_sources)):
        for source in sources:
            exists = is_hub(source.path) or Path(source.path).exists()
            rule(exists, f"{name}={source.path}: there is no such file or folder")
        stems = [stem(source_name(source.path)) for source in sources]
        rule(
            name != "data.eval_sources" or len(set(stems)) == len(stems),
            f"{name}: two of {', '.join(stems)} have one name, by which figures are called: rename a file",
        )
        if sources:
            _check_rows(config, sources, architecture.vocab_size)
    trackers.check_installed(config.logging)
    rule(
        not (config.run.port and port_in_use(config.run.port)),
        f"run.port={config.run.port} is in use: leave it 0 for a free one",
    )


def _check_scale(config: Config) -> None:
    """Whether 0..1 is what reward.scale=signed maps: rewards of another sum would not lie in -1..+1."""
    whole = sum(weight for weight, _ in terms(config.verifier))
    rule(
        config.reward.scale == "verifier" or whole == 0 or math.isclose(whole, 1),
        f"reward.scale=signed maps rewards of 0..1 to -1..+1, and those of verifier={config.verifier!r} go to "
        f"{whole:g}: choose weights that add up to 1",
    )


def _check_rows(config: Config, sources: list[SourceConfig], vocab_size: int) -> None:
    """Read the data once more than needed: an error comes in seconds, and before an earlier run is replaced."""
    from megatron_rlvr.prompts import load_prompts
    from megatron_rlvr.tokenizer import load_tokenizer

    prompts = load_prompts(sources, config.data, load_tokenizer(config.model.path), config.verifier)
    prompts.check_ids(vocab_size, config.model.path)


def _check_critic(config: Config, policy: Architecture, wanted: int) -> None:
    """Whether the critic fits the policy's tokens and layout, and has the ``wanted`` heads that a method reads."""
    heads = config.critic.num_heads if config.has_critic else 0
    rule(
        heads >= wanted,
        f"exploration: a method reads how far the critic's heads disagree, which takes {wanted} heads, but the run has "
        + (f"critic.num_heads={heads}" if heads else "no critic")
        + f": set algorithm.advantage=gae and critic.num_heads to at least {wanted}",
    )
    if heads and config.critic.path:
        critic = Architecture.from_folder(config.critic.path, key="critic.path")
        critic.check_trains("critic.path")
        critic.check_layout(config.parallel.tp, config.parallel.pp, config.parallel.vpp, config.parallel.cp)
        critic.check_length(config.longest)
        rule(
            critic.vocab_size == policy.vocab_size,
            f"critic.path={config.critic.path} has {critic.vocab_size} tokens, the policy {policy.vocab_size}: the "
            f"critic reads the policy's tokens",
        )
