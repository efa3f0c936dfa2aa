"""The random streams of this process: Python's, numpy's, torch's, and those that Megatron draws dropout masks from."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_rlvr import platform


def streams() -> dict[str, Any]:
    """Where each of them stands, as tensors and plain numbers: ``torch.load(weights_only=True)`` takes them back."""
    drawn: Any = numpy.random.get_state()
    name, keys, position, has_gauss, gauss = drawn
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.copy()), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "megatron": {name: stream.clone() for name, stream in get_cuda_rng_tracker().get_states().items()},
    }
    if platform.has_gpu():
        state["cuda"] = torch.cuda.get_rng_state(platform.device())
    return state


def restore(state: dict[str, Any]) -> None:
    """Go on where ``streams`` stood; Megatron's streams of a GPU mean nothing on a CPU, nor the other way round."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    numpy.random.set_state((name, keys.numpy(), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if ("cuda" in state) == platform.has_gpu():
        get_cuda_rng_tracker().set_states(state["megatron"])
    if "cuda" in state and platform.has_gpu():
        torch.cuda.set_rng_state(state["cuda"], platform.device())
