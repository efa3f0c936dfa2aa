"""One verifier process: ``python -m megatron_rlvr.verifiers.worker NAME DEADLINE``.

Reads [response, answer] and writes [verdict, peak memory in MiB], one JSON line each. JSON and not pickle: what comes
back from a process that has read a model's text must not be able to run code in the trainer.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_rlvr.processes import die_with_parent
from megatron_rlvr.verifiers import judge, load

MEMORY = 2048  # MiB of address space; 9**9**9 fails here instead of taking the machine's memory


def main(name: str, deadline: float) -> None:
    """Serve until stdin closes; the parent's death kills it even in the middle of an answer.

    ``deadline``: seconds of CPU time per answer. The kernel's profiling timer ends the process by SIGPROF, also in the
    middle of a C function that never returns to Python.
    """
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY << 20, MEMORY << 20))
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a verifier prints must not mix with the replies
    verifier = load(name)
    print("ready", file=replies, flush=True)
    for line in requests:
        response, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, deadline)
        verdict = judge(verifier, response, answer)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        print(json.dumps([asdict(verdict), peak_memory()]), file=replies, flush=True)


def peak_memory() -> int:
    """MiB of resident memory that this program has used at most.

    Not getrusage's: that counts what the parent held when it started this process, which is gigabytes in a trainer.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
