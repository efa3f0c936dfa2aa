"""What it means to resume a run with another config: nothing, other last bits, another run, or none at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.checkpoint_folder import checkpoints, damage, step_of
from megatron_rlvr.config import Config, ConfigError, flat, rule, to_dict
from megatron_rlvr.exploration.base import all_filled, filled
from megatron_rlvr.run_folder import INITIAL
from megatron_rlvr.types import Prompt

# Keys, or sections of them, that never reach a weight (reward.deadline does where a verifier fails, and is the cure for
# it; critic.head_init has, before the checkpoint). The longest name that fits a key counts.
FREE = [
    *("name", "prepare", "logging", "data.path", "data.eval_path", "data.eval_sources", "data.strict"),
    *("reward.workers", "reward.deadline", "reward.max_error_share", "critic.head_init"),
    *("trainer.num_steps", "trainer.eval_every", "trainer.eval_responses", "trainer.eval_temperature"),
    *("trainer.log_rollouts", "trainer.save_every", "trainer.keep_last", "trainer.keep_best"),
]

# The same numbers, summed in another order.
ROUNDING = [
    *("parallel", "rollout.tp", "rollout.max_running", "trainer.microbatch_tokens", "model.recompute", "model.logits"),
    *("optimizer.distributed", "critic.optimizer.distributed"),
    *("rollout.kv_cache_mib", "rollout.gpu_memory_utilization"),  # how many responses an engine decodes together
]

DRAWS = ("parallel", "trainer.microbatch_tokens")  # random streams are a rank's, and go by the microbatch

REPACKED = (
    "the loss is another one from here on: algorithm.reduction or a method's scope takes it within microbatches, and "
    "responses are packed into other ones"
)

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
    """The config as plain values, with what its prompts are, and where the run's own folder lies left out.

    Methods have all their options there: a default is no less a setting than one that is written out.
    """
    settings = json.loads(json.dumps(to_dict(config) | {"exploration": all_filled(config.exploration)}))
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
    """Steps, the model's shape, and ``check_resume`` as far as it goes without the prompts, before a rank starts.

    Of the newest checkpoint that is whole as far as that shows at once: the ranks say what is wrong with newer ones.
    Raises ConfigError.
    """
    path = next((path for path in reversed(checkpoints(folder)) if not damage(path, read=False)), None)
    if path is None:
        return
    state = json.loads((path / "run.json").read_text())
    saved = state["config"]
    check_steps(path, config)
    _check_shape(path, state.get("shapes", {}).get("policy", {}), config.model.path)
    now = settings_of(config, [])
    now["data"]["contents"] = saved["data"]["contents"]
    check_resume(saved, now, config.run.accept_changes)


def _check_shape(path: Path, held: Mapping[str, Any], model: str) -> None:
    """Raises ConfigError where the model's folder is of another shape than the checkpoint's policy."""
    wanted = json.loads(json.dumps(asdict(Architecture.from_folder(model)))) if held else {}
    for key in held.keys() & wanted.keys():
        rule(
            held[key] == wanted[key],
            f"{path} has a policy of {key} {held[key]}, but model.path={model!r} is of {key} {wanted[key]}: set back "
            f"model.path, or begin a new run in another run.dir",
        )


def check_steps(path: Path, config: Config) -> None:
    """Raises ConfigError where the checkpoint has more steps behind it than the run is to have."""
    done, wanted = step_of(path), config.trainer.num_steps
    rule(
        done <= wanted,
        f"trainer.num_steps={wanted}, but {path} has {done} steps behind it: set at least {done}, or begin a new run "
        f"in another run.dir; tools/convert_hf.py export makes a model of an earlier checkpoint",
    )


class Changes(NamedTuple):
    """Lines on what changed, by what that does to the run."""

    free: list[str]  # nothing
    rounding: list[str]  # other last bits
    other: list[str]  # another run
    impossible: list[str]  # no run: the checkpoint's tensors do not fit


def describe(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """What changed between two trees of plain values, as ``settings_of`` makes them."""
    # A key that is younger than the checkpoint had the effect of its default.
    before, after = flat(_with_methods(saved, now)), flat(_with_methods(now, saved))
    before = {key: value for key, value in flat(to_dict(Config())).items() if key in after} | before
    misfits, repacking = _misfits(before, after), _repacking(before, after) if _by_microbatch(now) else set()
    changes = Changes([], [], [], [])
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key, "(absent)"), after.get(key, "(absent)")
        if old == new or key.startswith("run."):  # how it is started, not what it is
            continue
        change = f"{key}: {_short(old)} -> {_short(new)}"
        name = _section(key, [*FREE, *ROUNDING, *MEANING])
        if key in misfits:
            changes.impossible.append(f"{change} ({misfits[key]})")
        elif _is_free(key, name, after):
            changes.free.append(change)
        elif key in repacking:
            changes.other.append(f"{change} ({REPACKED})")
        elif key == "model.logits" and _float32_logits(before) != _float32_logits(after):
            changes.other.append(f"{change} (bfloat16 moves log-probs by hundredths of a nat, float32 does not)")
        elif name in ROUNDING:
            masks = ", and so do dropout's masks" if name in DRAWS and after["model.dropout"] else ""
            changes.rounding.append(f"{change} (sums in another order: last bits differ{masks})")
        else:
            changes.other.append(f"{change} ({MEANING.get(name, 'the run is another one from here on')})")
    return changes


def _is_free(key: str, name: str, after: Mapping[str, Any]) -> bool:
    has_critic = after["algorithm.advantage"] == "gae"
    if key.startswith("critic.") and not has_critic:
        return True
    if key == "trainer.num_steps":
        optimizers = ["optimizer", "critic.optimizer"] if has_critic else ["optimizer"]
        return all(after[f"{section}.schedule"] == "constant" for section in optimizers)
    return name in FREE


def _misfits(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Keys whose change asks for tensors that the checkpoint does not hold -> what it holds."""
    reasons = {"model.dtype": f"the checkpoint's weights are {before['model.dtype']}"}
    had_critic, has_critic = (flat["algorithm.advantage"] == "gae" for flat in (before, after))
    if had_critic and has_critic:
        reasons["critic.num_heads"] = f"the checkpoint's critic has {before['critic.num_heads']}"
    elif has_critic:
        reasons["algorithm.advantage"] = "the checkpoint holds no critic"
    return reasons


def _float32_logits(settings: Mapping[str, Any]) -> bool:
    """As Architecture.logits_form, of flat settings: whether the logits of a bfloat16 model are kept in float32."""
    of_older = settings["trainer.updates_per_rollout"] > 1 or settings["model.dropout"] > 0
    form = settings["model.logits"]
    return settings["model.dtype"] == "bfloat16" and (form == "fused_float32" or (form == "auto" and of_older))


def _by_microbatch(settings: Mapping[str, Any]) -> bool:
    """Whether the loss depends on which responses share a microbatch."""
    scopes = flat(settings["exploration"]).values()
    return settings["algorithm"]["reduction"] == "microbatch_token_mean" or "microbatch" in scopes


def _repacking(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Keys whose change puts other responses into a microbatch (packing.pack); tp and cp only share the work on one."""
    # The number of microbatches is a multiple of the stages where virtual ones interleave.
    multiples = {flat["parallel.pp"] if flat["parallel.vpp"] > 1 else 1 for flat in (before, after)}
    stages = {"parallel.pp", "parallel.vpp"} if len(multiples) > 1 else set()
    return {"trainer.microbatch_tokens", "parallel.dp"} | stages


def _with_methods(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with every option of the methods that both have; one that ``other`` lacks is a line, not its options."""
    mine, theirs = tree["exploration"], other["exploration"]
    methods = {name: _options(name, options) if name in theirs else "on" for name, options in mine.items()}
    rest = {key: value for key, value in tree.items() if key != "exploration"}
    return rest | ({"exploration": methods} if methods else {})


def _options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    try:
        return filled(name, options)
    except ConfigError:  # of a version whose methods had other options: compared as they are
        return options


def check_resume(saved: Mapping[str, Any], now: Mapping[str, Any], accepted: bool) -> list[str]:
    """Lines to say aloud.

    Raises ConfigError where the run would be another one and that is not ``accepted``, or where no run can go on so.
    """
    changes = describe(saved, now)
    if changes.impossible:
        raise ConfigError(
            "no run can go on from the checkpoint with this config:\n  "
            + "\n  ".join(changes.impossible)
            + "\n  set these back, or begin a new run in another run.dir, for example with the model.path that "
            "tools/convert_hf.py export makes of the checkpoint"
        )
    if changes.other and not accepted:
        raise ConfigError(
            "the config is not the one that the checkpoint was made with:\n  "
            + "\n  ".join(changes.other)
            + "\n  set these back, or go on all the same with run.accept_changes=true"
        )
    return [f"changed since the checkpoint: {line}" for lines in changes for line in lines]


def _section(key: str, names: list[str]) -> str:
    fitting = [name for name in names if key == name or key.startswith(name + ".")]
    return max(fitting, key=len, default="")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
