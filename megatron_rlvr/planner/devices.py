"""What one accelerator brings: published figures, and the shares of them that a run is expected to reach."""

from __future__ import annotations

import os
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Memory as a process sees it, bytes; dense bf16 FLOP/s; bandwidths in bytes/s, one direction."""

    name: str
    memory: int
    flops: float
    memory_bandwidth: float
    link: float  # to a GPU of the same node
    network: float  # to another node, per GPU
    per_node: int
    source: str
    packed_attention: bool = True  # Transformer Engine's, without flash-attn

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


def _nvidia(
    name: str, gib: float, tflops: float, tb_per_s: float, nvlink: float, network: float, source: str
) -> Device:
    """``nvlink`` and ``network`` in GB/s."""
    memory, packed = int(gib * GIB), not name.startswith("a100")
    return Device(name, memory, tflops * 1e12, tb_per_s * 1e12, nvlink * 1e9, network * 1e9, 8, source, packed)


# Network: one ConnectX port per GPU as NVIDIA's DGX systems have it, 400 Gb/s (Hopper) or 200 Gb/s (Ampere).
_DEVICES = [
    _nvidia("h200", 139.8, 989, 4.8, 450, 50, "NVIDIA H200 data sheet (SXM), DGX H200 data sheet"),
    _nvidia("h100", 79.1, 989, 3.35, 450, 50, "NVIDIA H100 data sheet (SXM), DGX H100 data sheet"),
    _nvidia("h20", 95.1, 148, 4.0, 450, 50, "NVIDIA H20 figures as published by resellers"),
    _nvidia("h800", 79.1, 989, 3.35, 200, 50, "NVIDIA H800 figures as published by resellers"),
    _nvidia("a100-80", 79.1, 312, 2.04, 300, 25, "NVIDIA A100 data sheet (80 GB SXM), DGX A100 data sheet"),
    _nvidia("a100-40", 39.4, 312, 1.56, 300, 25, "NVIDIA A100 data sheet (40 GB SXM), DGX A100 data sheet"),
    _nvidia("b200", 178.4, 2250, 8.0, 900, 50, "NVIDIA HGX B200 data sheet"),
]


def _cpu() -> Device:
    """This machine, whose ranks share its memory; a core's figures are of the machine the project is tested on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        "cpu", memory, 1e11, 2e10, 2e9, 2e9, 1 << 30, "one core of a 2-core x86 machine with AVX-512, measured"
    )


DEVICES = {device.name: device for device in [*_DEVICES, _cpu()]}
