"""What every test shares: one thread per process, and real data only where a folder of it is named."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports torch: two ranks with a thread per core each are six times slower than with one.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

DATA = "MEGATRON_RLVR_DATA"


def pytest_configure(config: pytest.Config) -> None:
    folder = os.environ.get(DATA)
    if folder and not Path(folder).is_dir():
        raise pytest.UsageError(
            f"{DATA}={folder} is not a folder: name the one that holds train/ and eval/, or unset it"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(DATA):
        return
    skip = pytest.mark.skip(reason=f"{DATA} is unset: it names the folder of the published data sets")
    for item in items:
        if "real_data" in item.keywords:
            item.add_marker(skip)
