"""The shapes of public models, for a config whose model folder is not on this machine.

From the config.json of each repository on Hugging Face (organisation Qwen), arXiv 2412.15115 Table 1 (Qwen2.5) and
arXiv 2505.09388 Table 1 (Qwen3). A test holds them to the published parameter counts.
"""

from __future__ import annotations

from pathlib import Path

from megatron_rlvr.architecture import Architecture, Family
from megatron_rlvr.config import Config, ConfigError


class NotMadeYet(ConfigError):
    """A model that the config's ``prepare`` script still has to make: there is nothing to plan, and nothing wrong."""


def _qwen(
    family: Family,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    vocab: int,
    tied: bool,
    positions: int,
) -> Architecture:
    return Architecture(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128 if family == "qwen3" else hidden // heads,
        ffn_size=ffn,
        vocab_size=vocab,
        tied=tied,
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        rope_theta=1e6,
        rms_eps=1e-6,
        max_positions=positions,
    )


SHAPES = {
    "Qwen2.5-0.5B": _qwen("qwen2", 24, 896, 14, 2, 4864, 151936, True, 32768),
    "Qwen2.5-1.5B": _qwen("qwen2", 28, 1536, 12, 2, 8960, 151936, True, 131072),
    "Qwen2.5-3B": _qwen("qwen2", 36, 2048, 16, 2, 11008, 151936, True, 32768),
    "Qwen2.5-7B": _qwen("qwen2", 28, 3584, 28, 4, 18944, 152064, False, 131072),
    "Qwen2.5-14B": _qwen("qwen2", 48, 5120, 40, 8, 13824, 152064, False, 131072),
    "Qwen2.5-32B": _qwen("qwen2", 64, 5120, 40, 8, 27648, 152064, False, 131072),
    "Qwen2.5-72B": _qwen("qwen2", 80, 8192, 64, 8, 29568, 152064, False, 131072),
    "Qwen3-0.6B-Base": _qwen("qwen3", 28, 1024, 16, 8, 3072, 151936, True, 32768),
    "Qwen3-1.7B-Base": _qwen("qwen3", 28, 2048, 16, 8, 6144, 151936, True, 32768),
    "Qwen3-4B-Base": _qwen("qwen3", 36, 2560, 32, 8, 9728, 151936, True, 32768),
    "Qwen3-8B-Base": _qwen("qwen3", 36, 4096, 32, 8, 12288, 151936, False, 32768),
    "Qwen3-14B-Base": _qwen("qwen3", 40, 5120, 40, 8, 17408, 151936, False, 32768),
    "Qwen3-32B": _qwen("qwen3", 64, 5120, 64, 8, 25600, 151936, False, 40960),
}


def find_architecture(config: Config, path: str, key: str) -> tuple[Architecture, str]:
    """(shape, where it comes from) of the model at ``path``, which the config calls ``key``. Raises ConfigError.

    A folder's own config.json comes first; where there is no such folder its last name decides, as in
    models/Qwen2.5-32B. Raises NotMadeYet where that is what keeps it from planning.
    """
    name = Path(path).name
    if Path(path).is_dir() or name not in SHAPES:
        if config.prepare and not Path(path).exists():
            raise NotMadeYet(
                f"{key}={path} is not there yet: the run makes it with {config.prepare} first, and checks it then"
            )
        if not Path(path).is_dir():
            raise ConfigError(
                f"{key}={path!r} is neither a folder with a config.json nor ends in a name whose public shape is known "
                f"here ({', '.join(SHAPES)}): give a model folder; its config.json is enough to plan"
            )
        architecture = Architecture.from_folder(path, key)
        architecture.check_trains(key)
        return architecture, f"{path}/config.json"
    return SHAPES[name], f"the public shape of {name}; {path} is not on this machine"
