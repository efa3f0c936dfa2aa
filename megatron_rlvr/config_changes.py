"""What it means to resume a run with another config: nothing, other last bits, or another run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rlvr.checkpoint_folder import checkpoints
from megatron_rlvr.config import Config, ConfigError, to_dict
from megatron_rlvr.run_folder import INITIAL
from megatron_rlvr.types import Prompt

# Keys, or sections of them, that never reach a weight. The longest name that fits a key counts.
FREE = [
    *("name", "prepare", "logging", "data.path", "data.eval_path", "data.eval_sources", "data.strict"),
    *("reward.workers", "reward.deadline", "rollout.kv_cache_mib", "rollout.gpu_memory_utilization"),
    *("trainer.num_steps", "trainer.eval_every", "trainer.eval_responses", "trainer.eval_temperature"),
    *("trainer.log_rollouts", "trainer.save_every", "trainer.keep_last", "trainer.keep_best"),
]

# The same numbers, summed in another order.
ROUNDING = [
    *("parallel", "rollout.tp", "rollout.max_running", "trainer.microbatch_tokens", "model.recompute", "model.logits"),
    *("optimizer.distributed", "critic.optimizer.distributed"),
]

MEANING = {
    "seed": "prompts come in another order and samples are drawn anew: some prompts come twice, others not at all",
    "verifier": "answers are judged differently from here on",
    "data": "prompts are other ones or come in another order: the position in the old order means nothing in the new",
    "data.contents": "the file holds other prompts than before: the position in the old ones means nothing in the new",
    "rollout.prompts_per_step": "a step takes another number of prompts; it goes on behind the prompts already taken",
    "rollout.responses_per_prompt": "groups are of another size from here on",
    "rollout": "responses are sampled differently from here on",
    "reward": "rewards are of another size from here on",
    "algorithm": "the loss is another one from here on",
    "exploration": "the method is another one from here on; what a new method remembers starts empty",
    "optimizer": "the updates are others from here on; moments and the number of updates are kept",
    "critic": "the critic's values or updates are others from here on",
    "trainer.updates_per_rollout": "a rollout is cut into another number of updates; schedules count updates",
    "trainer.num_steps": "the learning rate's decay ends at another step",
    "model.path": "tokenizer and reference are those of the other folder; the weights are the checkpoint's",
    "model": "the weights are those of the checkpoint, all else is as the config says",
}


def settings_of(config: Config, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The config as plain values, with what its prompts are, and where the run's own folder lies left out."""
    settings = json.loads(json.dumps(to_dict(config)))
    own = str(config.run_dir)
    if settings["model"].pop("random_init"):  # the ranks are given the folder that the weights were drawn into
        settings["model"]["path"] = f"{own}/{INITIAL}"
    for section in ("model", "critic"):
        settings[section]["path"] = settings[section]["path"].replace(own, "RUN", 1)
    for source in settings["data"]["sources"]:
        del source["path"]  # files may move, as that of data.path: contents says what is in them
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.token_ids, prompt.answer], default=str).encode())
    settings["data"]["contents"] = f"{len(prompts)} prompts, {digest.hexdigest()}"
    return settings


def check_newest(config: Config, folder: Path) -> None:
    """``check_resume`` as far as it goes without the prompts: before a rank starts. Raises ConfigError."""
    for path in checkpoints(folder)[-1:]:
        try:
            saved = json.loads((path / "run.json").read_text())["config"]
        except (OSError, ValueError, KeyError):
            return  # the ranks will say what is wrong with it, and use the one before
        now = settings_of(config, [])
        now["data"]["contents"] = saved["data"]["contents"]
        check_resume(saved, now, config.run.accept_changes)


def describe(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Nested plain values -> lines on what changed: without an effect, in the last bits, into another run."""
    after = _flat(now)
    before = _flat(saved)
    # A key that is younger than the checkpoint had the effect of its default.
    before = {key: value for key, value in _flat(to_dict(Config())).items() if key in after} | before
    lines: tuple[list[str], list[str], list[str]] = ([], [], [])
    decays = any(after.get(f"{section}.schedule") != "constant" for section in ("optimizer", "critic.optimizer"))
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key, "(absent)"), after.get(key, "(absent)")
        if old == new or key.startswith("run."):  # how it is started, not what it is
            continue
        change = f"{key}: {_short(old)} -> {_short(new)}"
        name = _section(key, [*FREE, *ROUNDING, *MEANING])
        if name in FREE and not (key == "trainer.num_steps" and decays):
            lines[0].append(change)
        elif name in ROUNDING:
            lines[1].append(f"{change} (sums in another order: last bits differ)")
        else:
            lines[2].append(f"{change} ({MEANING.get(name, 'the run is another one from here on')})")
    return lines


def check_resume(saved: Mapping[str, Any], now: Mapping[str, Any], accepted: bool) -> list[str]:
    """Lines to say aloud. Raises ConfigError where the run would be another one and that is not ``accepted``."""
    free, rounding, other = describe(saved, now)
    if other and not accepted:
        raise ConfigError(
            "the config is not the one that the checkpoint was made with:\n  "
            + "\n  ".join(other)
            + "\n  set these back, or go on all the same with run.accept_changes=true"
        )
    return [f"changed since the checkpoint: {line}" for line in free + rounding + other]


def _section(key: str, names: list[str]) -> str:
    fitting = [name for name in names if key == name or key.startswith(name + ".")]
    return max(fitting, key=len, default="")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
