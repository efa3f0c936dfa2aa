"""A rank of a run in which rank 1 stands still at WHERE: python hanging.py WHERE CONFIG key=value ..."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

from megatron_rlvr import train
from megatron_rlvr.models.policy import Policy
from megatron_rlvr.processes import leave
from megatron_rlvr.rollout.vllm_engine import VllmEngine
from megatron_rlvr.verifiers.pool import VerifierPool

PLACES = {"engine": (VllmEngine, "generate"), "verifiers": (VerifierPool, "stream"), "collective": (Policy, "update")}


def stand_still(*args: object, **options: object) -> NoReturn:
    while True:
        time.sleep(1)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        setattr(*PLACES[sys.argv[1]], stand_still)
    leave(train.main(sys.argv[2:]))
