"""The house keeps its floors: imports only go down, and each outside library stays where it belongs.

Read from the source with `ast`, so nothing is imported. A file that is on no floor yet fails too: say where it lives.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "megatron_rlvr"

# Module or folder -> floor; a module's own line wins over its folder's.
FLOORS = {
    0: "config config_reading config_rules loading platform processes seeds types verdict watchdog",
    1: "advantages architecture benchmarks checkpoint_folder decontamination environment "
    "evaluation evaluation_settings losses metrics packing pages planner progress prompt_files prompt_order "
    "prompt_report prompt_rows prompts records rollout_metrics run_folder run_warnings sample_store templates "
    "token_records tokenizer trackers verifiers verify_file weights.initial weights.mapping weights.partial_folder",
    2: "distributed group_advantages recorder value_targets",
    3: "config_changes exploration",
    4: "models rollout weights",
    5: "evaluate evaluation_critic evaluation_models evaluation_sampling launch preflight run train trainer",
}
FLOOR_OF = {PACKAGE: 0} | {f"{PACKAGE}.{name}": floor for floor, names in FLOORS.items() for name in names.split()}


USED_AS_IMPORTS = ("torch.distributed", "torch.cuda.is_available")  # attributes that reach as far as an import


@dataclass(frozen=True)
class Import:
    """One imported name: `from a.b import c` holds module "a.b" and name "c"; `import a.b` holds "a.b" and ""."""

    line: int
    module: str
    name: str
    in_function: bool

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


def module_name(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, path: str, in_function: bool = False) -> Iterator[Import]:
    """Every import of the file, relative ones made absolute, and `torch.distributed.x` written out in full."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, "", in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = ".".join(Path(path).parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (folder, node.module)))
            yield from (Import(node.lineno, module, alias.name, in_function) for alias in node.names)
        elif isinstance(node, ast.Attribute) and (name := ast.unparse(node)) in USED_AS_IMPORTS:
            yield Import(node.lineno, name, "", in_function)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, path, inside)


def floor(module: str) -> int | None:
    """The floor of a module, of a name inside one, or of its folder; None for what is on no floor."""
    while module != PACKAGE and module not in FLOOR_OF:
        module = module.rpartition(".")[0]
        if not module or module == PACKAGE:
            return None
    return FLOOR_OF[module]


def broken_rule(path: str, item: Import) -> str:
    """The rule that this import breaks, in words; empty where it breaks none."""
    here, top = module_name(path), item.module.partition(".")[0]
    mine = floor(here)
    assert mine is not None
    if top == PACKAGE:
        target = floor(item.full)
        # `from megatron_rlvr import __version__` names no module; its own floor is the ground.
        theirs = FLOOR_OF[PACKAGE] if target is None else target
        return f"floor {mine} imports floor {theirs}" if theirs > mine else ""
    if top in ("megatron", "vllm"):
        reaches_down = {"platform": ("megatron", "vllm"), "distributed.groups": ("megatron",)}
        inside = item.in_function and top in reaches_down.get(here.removeprefix(f"{PACKAGE}."), ())
        return "" if mine == 4 or inside else f"{top} stays on floor 4 (platform.py adjusts it inside functions)"
    if item.full.startswith("torch.distributed") and not here.startswith(f"{PACKAGE}.distributed"):
        names_a_type = mine >= 2 and item.full == "torch.distributed.ProcessGroup"
        names_a_format = mine == 4 and item.full.startswith("torch.distributed.checkpoint")  # of files: no rank speaks
        allowed = names_a_type or names_a_format
        return "" if allowed else "torch.distributed stays in distributed/ (ProcessGroup and checkpoint files aside)"
    if item.full == "torch.cuda.is_available" and here != f"{PACKAGE}.platform":
        return "only platform.py knows whether there is a GPU"
    return ""


def offences(path: str, source: str) -> list[str]:
    """Each broken rule as `file:line: the line  <- the rule`."""
    if floor(module_name(path)) is None:
        return [f"{path}: on no floor yet; add it to FLOORS in tests/test_house.py and to the picture in the README"]
    lines = source.splitlines()
    broken = [(item.line, broken_rule(path, item)) for item in imports(ast.parse(source), path)]
    return [f"{path}:{line}: {lines[line - 1].strip()}  <- {rule}" for line, rule in dict.fromkeys(broken) if rule]


def test_the_house_keeps_its_floors() -> None:
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    assert len(files) > 20, "the package was not found, so nothing was checked"
    found = [line for file in files for line in offences(str(file.relative_to(ROOT)), file.read_text())]
    assert not found, "\n" + "\n".join(found)


def test_submitting_a_job_needs_neither_torch_nor_an_engine() -> None:
    """Follow what launch/ and planner/ import when loaded: a login node has no torch, no Megatron and no vLLM."""
    todo = [(file, "") for folder in ("launch", "planner") for file in sorted((ROOT / PACKAGE / folder).rglob("*.py"))]
    assert len(todo) > 8, "launch/ or planner/ was not found, so nothing was checked"
    seen = set()
    while todo:
        file, way = todo.pop()
        path = str(file.relative_to(ROOT))
        for item in imports(ast.parse(file.read_text()), path):
            at = f"{way}{path}:{item.line}"
            assert item.in_function or item.module.partition(".")[0] not in ("torch", "megatron", "vllm"), at
            for target in (item.full, item.module):
                found = ROOT.joinpath(*target.split(".")).with_suffix(".py")
                if not item.in_function and found.exists() and found not in seen:
                    seen.add(found)
                    todo.append((found, f"{at} -> "))


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("losses.py", "from megatron_rlvr.models.policy import Policy", "floor 1 imports floor 4"),
        ("losses.py", "def f():\n    import megatron_rlvr.trainer", "floor 1 imports floor 5"),
        ("losses.py", "from megatron_rlvr import distributed", "floor 1 imports floor 2"),
        ("weights/mapping.py", "from . import gather", "floor 1 imports floor 4"),
        ("weights/mapping.py", "from ..distributed.groups import init", "floor 1 imports floor 2"),
        ("types.py", "from megatron_rlvr.weights import mapping", "floor 0 imports floor 1"),
        ("trainer.py", "import vllm", "vllm stays on floor 4"),
        ("exploration/cde.py", "from megatron.core import parallel_state", "megatron stays on floor 4"),
        ("platform.py", "from megatron.core import parallel_state", "megatron stays on floor 4"),
        ("distributed/groups.py", "def f():\n    import vllm", "vllm stays on floor 4"),
        ("models/policy.py", "import torch\ntorch.distributed.barrier()", "torch.distributed stays"),
        ("models/policy.py", "import torch.distributed as dist", "torch.distributed stays"),
        ("models/policy.py", "from torch import distributed", "torch.distributed stays"),
        ("losses.py", "from torch.distributed import ProcessGroup", "torch.distributed stays"),
        ("models/policy.py", "import torch\nif torch.cuda.is_available():\n    pass", "only platform.py knows"),
        ("newcomer.py", "import json", "on no floor yet"),
    ],
)
def test_the_checker_sees_what_it_should(path: str, source: str, rule: str) -> None:
    found = offences(f"{PACKAGE}/{path}", source)
    assert len(found) == 1 and rule in found[0]
    if rule != "on no floor yet":
        line = next(line for line in source.splitlines() if line.strip() in found[0])
        assert found[0].startswith(f"{PACKAGE}/{path}:{source.splitlines().index(line) + 1}: ")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("trainer.py", "from megatron_rlvr import __version__, platform"),
        ("distributed/groups.py", "import torch.distributed as dist\ndef f():\n    from megatron.core import x"),
        ("exploration/lp_reg.py", "from torch.distributed import ProcessGroup"),
        ("weights/gather.py", "from megatron_rlvr.weights import mapping\nimport megatron.core"),
        ("rollout/vllm_engine.py", "from .engine import Engine\nimport vllm"),
        (
            "platform.py",
            "import torch\ndef f():\n    import megatron.core, vllm\n    return torch.cuda.is_available()",
        ),
    ],
)
def test_the_checker_lets_the_rest_be(path: str, source: str) -> None:
    assert offences(f"{PACKAGE}/{path}", source) == []
