"""Other frameworks' log-prob and entropy of sharded logits, from source trees that the user has: their own functions.

``--peers DIR`` names a folder with any of DIR/slime (THUDM/slime), DIR/verl (verl-project/verl) and DIR/nemo_rl
(NVIDIA-NeMo/RL). Only the module with the function is loaded, so their other dependencies are not needed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rlvr.config import rule

NEMO_CHUNK = 256  # tokens, the default of its policy config

Run = Callable[[Any, Any], Any]  # (logits [T, V/tp], targets [T]) -> scalar to differentiate


def trees(folder: str) -> dict[str, Path]:
    """name -> source tree. Raises ConfigError where the folder holds none."""
    found = {name: Path(folder, name) for name in MAKERS if Path(folder, name).is_dir()}
    rule(bool(found), f"--peers {folder}: there is none of the folders {', '.join(MAKERS)} in it")
    return found


def from_trees(folder: str, group: Any, tp_rank: int) -> dict[str, Run]:
    """name -> log-prob + 0.1 entropy, summed, with both gradients."""
    return {name: MAKERS[name](tree, group, tp_rank) for name, tree in trees(folder).items()}


def slime(tree: Path, group: Any, tp_rank: int) -> Run:
    statistics = load(tree / "slime/utils/ppo_utils.py").calculate_log_probs_and_entropy

    def run(logits, targets):
        log_prob, entropy = statistics(logits, targets, group, with_entropy=True)
        return log_prob.sum() + 0.1 * entropy.sum()

    return run


def verl(tree: Path, group: Any, tp_rank: int) -> Run:
    module = load(tree / "verl/utils/megatron/tensor_parallel.py")

    def run(logits, targets):
        # As its engine does: the cross-entropy overwrites the logits that the entropy reads.
        entropy = module.vocab_parallel_entropy(logits.clone())
        return module.vocab_parallel_log_probs_from_logits(logits, targets).sum() + 0.1 * entropy.sum()

    return run


def nemo_rl(tree: Path, group: Any, tp_rank: int) -> Run:
    sys.path.insert(0, str(tree))  # the module imports a sibling
    module = load(tree / "nemo_rl/distributed/model_utils.py")

    def run(logits, targets):
        columns, whole = logits.shape[1], logits[None]
        first = tp_rank * columns
        log_prob = module.ChunkedDistributedLogprob.apply(
            whole, targets[None], first, first + columns, NEMO_CHUNK, group
        )
        negative_entropy = module.ChunkedDistributedEntropy.apply(whole, NEMO_CHUNK, group)
        return log_prob.sum() - 0.1 * negative_entropy.sum()

    return run


def load(file: Path) -> Any:
    """The module in ``file``, without the package around it. Raises ConfigError where the tree has no such file."""
    rule(file.is_file(), f"{file}: the tree has another layout than the one this bench was written for")
    spec = importlib.util.spec_from_file_location(f"peer_{file.stem}", file)
    assert spec is not None and spec.loader is not None  # true for every .py path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


MAKERS = {"slime": slime, "verl": verl, "nemo_rl": nemo_rl}
