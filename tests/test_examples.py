"""Every config that is shipped can be read, fits its own rules, and names methods that run together."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_rlvr.config import load_config
from megatron_rlvr.exploration.base import build

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "examples").glob("**/*.yaml") if "build" not in str(path)
)


@pytest.mark.parametrize("path", [path for path in CONFIGS if not Path(path).stem.startswith(("base", "_"))])
def test_config(path: str) -> None:
    config = load_config(ROOT / path)
    needs = build(config.exploration, config).needs()
    assert (config.critic.num_heads if config.has_critic else 0) >= needs.value_heads


def test_each_file_of_the_comparison_differs_from_the_others() -> None:
    methods = [path for path in CONFIGS if "compare_exploration/methods" in path]
    trees = [yaml.safe_dump(yaml.safe_load((ROOT / path).read_text())) for path in methods]
    assert len(methods) >= 11 and len(set(trees)) == len(trees)
