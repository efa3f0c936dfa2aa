"""The folders that an evaluation reads: a Hugging Face folder as it is, a Megatron folder through an export.

model = find_model("runs/demo/checkpoints/step_40")
tokenizer = load_tokenizer(model)
folder = hugging_face(model, Path("evaluation/model"))
"""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.checkpoint_folder import checkpoints, step_of
from megatron_rlvr.config import rule
from megatron_rlvr.evaluation_settings import Settings
from megatron_rlvr.weights.convert_export import export_megatron
from megatron_rlvr.weights.megatron_folder import is_megatron_folder, model_folder
from megatron_rlvr.weights.partial_folder import fingerprint
from megatron_rlvr.weights.sources import VALUE_HEAD, open_source


def find_model(name: str) -> Path:
    """A Hugging Face or Megatron folder, a training checkpoint's policy, or the hf/ of a run. Raises ConfigError."""
    folder = Path(name)
    if (folder / "hf" / "config.json").exists():
        _refuse_outdated(folder)
        return folder / "hf"
    rule(
        not (folder / "checkpoints").exists(),
        f"{folder} is a run without hf/, which it writes at its end: name one of its checkpoints, "
        f"{folder}/checkpoints/step_N, or finish it with run.resume=must",
    )
    found = model_folder(folder)
    rule(
        (found / "config.json").exists(),
        f"{folder} is no Hugging Face folder (config.json), Megatron folder, checkpoint (policy/) or run (hf/)",
    )
    weights = "*.distcp" if is_megatron_folder(found) else "*.safetensors"
    rule(any(found.glob(weights)), f"{found} holds no {weights}: give a folder with a model's weights")
    is_critic = _has_value_head(found) if is_megatron_folder(found) else (found / VALUE_HEAD).exists()
    rule(not is_critic, f"{found} holds a critic, which says nothing: name its run's policy, or give it as --critic")
    return found


def differences(settings: Settings) -> list[str]:
    """What a run trained with and its evaluation does not, a line each; none for a folder that is no part of a run."""
    folder = Path(settings.model).resolve()
    homes = (folder, *folder.parents[:3])  # the run itself, its hf/, its checkpoints/step_N and their policy/
    written = ("config.yaml", "metrics.jsonl")
    run = next((home for home in homes if all((home / name).is_file() for name in written)), None)
    if run is None:
        return []
    trained = yaml.safe_load((run / "config.yaml").read_text())  # as it is: an earlier version may have written it
    if not isinstance(trained, dict) or not {"data", "rollout", "exploration"} <= trained.keys():
        return []  # another program's
    longest = (trained["rollout"] or {}).get("max_response_length", settings.max_tokens)
    template = (trained["data"] or {}).get("template", settings.template)
    keys = [
        ("data.template", template, "--template", settings.template),
        ("rollout.max_response_length", longest, "--max-tokens", settings.max_tokens),
    ]
    return [
        f"note: the run trained with {key}={there}, and this evaluation takes {flag} {here}"
        for key, there, flag, here in keys
        if here != there
    ]


def _refuse_outdated(run: Path) -> None:
    """A run that ended, and then went on with more steps, has the model of its first end until it ends again."""
    summary = run / "summary.json"
    newest = checkpoints(run)[-1:]
    if not newest or not summary.is_file():
        return
    done = json.loads(summary.read_text())["steps"]
    rule(
        step_of(newest[0]) <= done,
        f"{run}/hf is the model of step {done}, and the run has gone on since: name {run}/hf to measure that one, or "
        f"{newest[0]} for the newest",
    )


def find_critic(name: str, model: Path) -> Path:
    """A critic's Hugging Face or Megatron folder, or a training checkpoint's critic.

    Raises ConfigError: none, or one that does not read the tokens of ``model``.
    """
    folder = model_folder(name, "critic")
    rule(
        (folder / "config.json").exists() and _has_value_head(folder),
        f"critic={name!r} is no critic: name a checkpoint of a PPO run, RUN/checkpoints/step_N, or a folder with "
        f"{VALUE_HEAD}, which tools/convert_hf.py export --model critic writes",
    )
    critic, policy = (Architecture.from_folder(path).vocab_size for path in (folder, model))
    rule(
        critic == policy, f"critic={name!r} has {critic} tokens, the model {policy}: a critic reads the model's tokens"
    )
    return folder


def _has_value_head(folder: Path) -> bool:
    with open_source(folder, Architecture.from_folder(folder)) as source:
        return bool(source.value_head())


def identity(folder: Path) -> list[Any]:
    """What tells its weights from others: its place, and name, bytes and time of every file that holds them."""
    files = [file.name for pattern in ("*.safetensors", "*.distcp") for file in folder.glob(pattern)]
    return [str(folder.resolve()), fingerprint(folder, files)]


def hugging_face(folder: Path, target: Path) -> Path:
    """The folder itself, or TARGET-DIGEST, to which these very weights of a Megatron folder are exported once.

    By their ``identity``, for an evaluation that was killed may have left another model's export. Raises ConfigError.
    """
    if not is_megatron_folder(folder):
        return folder
    digest = blake2b(json.dumps(identity(folder)).encode(), digest_size=6).hexdigest()
    target = target.with_name(f"{target.name}-{digest}")
    if not target.exists():
        export_megatron(folder, target)
    return target
