"""Conversion both ways of a random Qwen3-shaped model, against copying its bytes; prints JSON lines.

python tools/bench_convert.py --folder /tmp/bench [--layers 36]

The model is written first, tensor by tensor, and all of it is removed at the end. Every phase is a process of its own:
its seconds, its anonymous memory at the peak (what a machine must have free; pages of files it can drop), and its
resident memory with those pages. The files are flushed to the disk in every phase, the copy's too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.weights.mapping import hf_shapes

TOOL = Path(__file__).with_name("convert_hf.py")
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
SHARD_BYTES = 2 << 30
POLL = 0.01


def write_model(folder: Path, layers: int) -> int:
    """Random bf16 weights in shards of SHARD_BYTES. Returns their bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    located: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        file = f"model-{len(set(located.values())) + 1:05}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        located.update(dict.fromkeys(held, file))
        held.clear()

    for name, shape in hf_shapes(Architecture.from_folder(folder)).items():
        # random bits are as incompressible as weights, and made at the speed of memory
        held[name] = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16).view(torch.bfloat16)
        total += held[name].nbytes
        if sum(tensor.nbytes for tensor in held.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": located}))
    return total


def measured(command: list[str]) -> dict[str, float]:
    """Seconds, and peak anonymous and resident MiB of a command, polled from /proc."""
    peaks = {"RssAnon": 0, "VmRSS": 0}
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(POLL):
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            for line in lines:
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]))

    watcher = threading.Thread(target=poll)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    if code:
        sys.exit(f"{' '.join(command)} ended with {code}")
    return {"seconds": round(seconds, 1), "anon_mib": peaks["RssAnon"] >> 10, "rss_mib": peaks["VmRSS"] >> 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="an empty place on the disk to measure")
    parser.add_argument("--layers", type=int, default=28, help="default: %(default)s, about 3 billion parameters")
    options = parser.parse_args()
    base: Path = options.folder
    hf, megatron, back = base / "hf", base / "megatron", base / "back"
    convert = [sys.executable, str(TOOL)]
    folders = ["--hf", str(hf), "--megatron", str(megatron)]
    phases = {
        "copy": ["sh", "-c", f"cp -r '{hf}' '{base}/copy' && sync '{base}'/copy/* && rm -r '{base}/copy'"],
        "import": [*convert, "import", *folders, "--tp", "2", "--pp", "2"],
        "export": [*convert, "export", "--hf", str(back), "--megatron", str(megatron)],
        "compare": [*convert, "verify", "--tensors-only", "--hf", str(hf), "--megatron", str(back)],
    }
    try:
        total = write_model(hf, options.layers)
        largest = max(file.stat().st_size for file in hf.glob("*.safetensors"))
        os.sync()
        copied = 0.0
        for name, command in phases.items():
            result = measured(command)
            copied = copied or result["seconds"]
            bound = 2 * (largest >> 20) + 1024
            ratio = round(result["seconds"] / copied, 2)
            line = {"phase": name, "gib": round(total / 2**30, 2), **result, "times_copy": ratio, "bound_mib": bound}
            print(json.dumps(line), flush=True)
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
