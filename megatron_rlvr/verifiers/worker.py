"""One verifier process: ``python -m megatron_rlvr.verifiers.worker NAME``.

Reads [response, answer] and writes a verdict, one JSON line each. JSON and not pickle: what comes back from a process
that has read a model's text must not be able to run code in the trainer.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict

from megatron_rlvr.processes import die_with_parent
from megatron_rlvr.verifiers import judge, load

_ADDRESS_SPACE = 4 << 30  # bytes; 9**9**9 fails here instead of taking the machine's memory


def main(name: str) -> None:
    """Serve until stdin closes; the parent's death kills it even in the middle of an answer."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a verifier prints must not mix with the replies
    verifier = load(name)
    print("ready", file=replies, flush=True)
    for line in requests:
        response, answer = json.loads(line)
        print(json.dumps(asdict(judge(verifier, response, answer))), file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
