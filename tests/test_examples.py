"""Every config that is shipped can be read, fits its own rules, and names methods that run together."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from megatron_rlvr.config import AlgorithmConfig, Config, check, from_dict, load_config
from megatron_rlvr.exploration.base import build

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "examples").glob("**/*.yaml") if "build" not in str(path)
)
# What every config has to say, whatever the method.
NEEDED = {
    "verifier": "math",
    "model": {"path": "model"},
    "data": {"path": "data.jsonl"},
    "rollout": {"max_response_length": 8192},
    "trainer": {"microbatch_tokens": 16384, "updates_per_rollout": 2},
}


@pytest.mark.parametrize("path", [path for path in CONFIGS if not Path(path).stem.startswith(("base", "_"))])
def test_config(path: str) -> None:
    config = load_config(ROOT / path)
    needs = build(config.exploration, config).needs()
    assert (config.critic.num_heads if config.has_critic else 0) >= needs.value_heads


def test_each_file_of_the_comparison_differs_from_the_others() -> None:
    methods = [path for path in CONFIGS if "compare_exploration/methods" in path]
    trees = [yaml.safe_dump(yaml.safe_load((ROOT / path).read_text())) for path in methods]
    assert len(methods) >= 11 and len(set(trees)) == len(trees)


def settings_of_the_readme() -> list[str]:
    """What the README's table of methods tells people to set, one snippet of YAML each."""
    _, section = (ROOT / "README.md").read_text().split("## Methods", 1)
    rows = [line.split("|")[2] for line in section.split("## Add a method")[0].splitlines() if line.startswith("| ")][
        1:
    ]
    return [snippet for row in rows for snippet in re.findall(r"`([^`]*[{][^`]*)`", row)]


@pytest.mark.parametrize("snippet", settings_of_the_readme())
def test_the_readmes_settings_are_settings(snippet: str) -> None:
    tree = yaml.safe_load(snippet)
    if not set(tree) & {"algorithm", "exploration", "critic"}:
        names = {item.name for item in dataclasses.fields(AlgorithmConfig)}
        tree = {"algorithm" if set(tree) <= names else "exploration": tree}
    if "critic" in tree:
        tree["critic"]["num_heads"] = 2
    config = from_dict(Config, tree | NEEDED)
    check(config)
    assert {method.name for method in build(config.exploration, config).methods} == set(tree.get("exploration", {}))
