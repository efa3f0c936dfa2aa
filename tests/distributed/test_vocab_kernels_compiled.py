"""What Triton's compiler, which needs no GPU, makes of the kernels: that they compile, and what a Hopper GPU would run.

The machine code is read with the disassembler that Triton brings. It does not say how fast the kernels are, but it does
say what would keep them from being fast: registers spilled to memory, narrow loads, too few warps, too many
instructions for a logit.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_rlvr import platform

if platform.interprets_triton():
    pytest.skip("kernels are interpreted here, not compiled", allow_module_level=True)
triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from megatron_rlvr.distributed import vocab_kernels  # noqa: E402

AMPERE, HOPPER, BLACKWELL = 80, 90, 100  # compute capabilities: A100, H100 and H200, B200
BYTES = {"bf16": 2, "fp32": 4}
# Instructions of the loop for each logit. An H100 issues 132 x 128 x 1.75 GHz = 29.6e12 a second, the memory of an H200
# copies 4.2e12 bytes in it: at 80 % of that rate there is time for 17 where a logit of two bytes is read.
AT_MOST = {"_largest_and_target": 4.0, "_sums": 15.5, "_threshold_sum": 8.5, "_overwrite": 13.5}
LONG, SHORT = vocab_kernels.LONG, vocab_kernels.SHORT
BUILT = [(name, SHORT) for name in AT_MOST] + [(name, LONG) for name in ("_largest_and_target", "_overwrite")]
TYPES = {"logits": "*{}", "entries": "*{}", "targets": "*i64", "ids": "*i64", "scale": "fp32", "BLOCK": "constexpr"}
TYPES |= dict.fromkeys(("stride", "rows", "columns", "start", "count"), "i32")


class Compiled(NamedTuple):
    registers: int
    spilled: int  # bytes to a thread
    loop: list[str]  # the largest one's instructions
    barriers: int


def build(name: str, shape: dict[str, int], dtype: str, capability: int) -> bytes:
    """The kernel as the launcher has it compiled, for a matrix whose rows all start at a multiple of 16 bytes."""
    kernel = getattr(vocab_kernels, name)
    signature = {argument: TYPES.get(argument, "*fp32").format(dtype) for argument in kernel.arg_names}
    places = {argument: (place,) for place, argument in enumerate(kernel.arg_names)}
    unknown = ("BLOCK", "scale", "count")
    aligned = {place: [["tt.divisibility", 16]] for argument, place in places.items() if argument not in unknown}
    source = ASTSource(kernel, signature, {places["BLOCK"]: shape["BLOCK"]}, aligned)
    options = {"num_warps": shape["num_warps"], "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


def read(binary: bytes, folder: Path) -> Compiled:
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def output(tool: str, option: str) -> str:
        return subprocess.run([tools / tool, option, path], capture_output=True, text=True, check=True).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", output("cuobjdump", "-res-usage"))
    assert usage
    code: list[str] = []
    labels: dict[str, int] = {}
    loop: list[str] = []
    for line in output("nvdisasm", "-c").splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;", line):
            code.append(instruction[1])
            back = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction[1])
            body = code[labels[back[1]] :] if back and back[1] in labels else []
            loop = max(loop, body, key=len)
    return Compiled(int(usage[1]), int(usage[2]) + int(usage[3]), loop, sum("BAR.SYNC" in line for line in code))


def count(code: list[str], operation: str) -> int:
    return sum(bool(re.search(rf"(^|\s){re.escape(operation)}\s", instruction)) for instruction in code)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize(("name", "shape"), BUILT)
def test_a_hopper_gpu_reads_each_logit_once_and_has_time_for_it(
    name: str, shape: dict[str, int], dtype: str, tmp_path: Path
) -> None:
    found = read(build(name, shape, dtype, HOPPER), tmp_path)
    assert found.spilled == 0
    assert found.registers <= (64 if name == "_sums" else 32)  # of 65,536 for 2,048 threads: half of them, or all
    loads = count(found.loop, "LDG.E.128")
    assert loads and count(found.loop, "LDG.E") == 0  # what is loaded in the loop are whole pieces of a row
    assert found.barriers or name != "_overwrite"  # between a row's gradients and the entries that replace some
    assert count(found.loop, "STG.E.128") == (loads if name == "_overwrite" else 0)
    assert len(found.loop) / (loads * 16 / BYTES[dtype]) <= AT_MOST[name]


@pytest.mark.parametrize("capability", [AMPERE, BLACKWELL])
def test_kernels_compile_for_the_generations_beside_it(capability: int) -> None:
    for name, shape in BUILT:
        assert build(name, shape, "bf16", capability)
