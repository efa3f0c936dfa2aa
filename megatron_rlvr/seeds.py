"""Seeds for random choices that must not depend on how the work is cut: from what is drawn, not from who draws it."""

from __future__ import annotations

import hashlib
import json


def stable_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63): the same on every machine, unrelated between neighbours.

    stable_seed(0, 12, "head", 3) for the third head's data in step 12 of a run with seed 0
    """
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "big") >> 1
