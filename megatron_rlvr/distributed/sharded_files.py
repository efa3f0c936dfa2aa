"""One folder written or read by all ranks together, each its own parts: torch's distributed checkpoint, read safely."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata


def background_group(timeout_seconds: float) -> ProcessGroup:
    """A group of all ranks for a thread of its own: on the CPU, and never mixed up with the step's collectives."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))


def write(tensors: dict[str, Any], planner: dcp.SavePlanner, folder: Path, group: ProcessGroup) -> None:
    """Write every rank's tensors and, last, ``.metadata``; collective over ``group``, and synced to the disk.

    Raises OSError on every rank when one of them cannot write, with that rank's reason.
    """
    # The tensors are host copies. With copies ahead torch would ask CUDA for a stream, which in a thread of its own is
    # one of GPU 0: every rank of a node would open a context there.
    writer = dcp.FileSystemWriter(folder, thread_count=1, sync_files=True, per_thread_copy_ahead=0)
    with _failures_as_errors():
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group)


def read(tensors: dict[str, Any], planner: dcp.LoadPlanner, folder: Path, metadata: Metadata) -> None:
    """Fill ``tensors`` in place; collective. ``metadata`` is the folder's, read safely before. Raises OSError."""
    with _failures_as_errors():
        dcp.load(tensors, storage_reader=_Reader(folder, metadata), planner=planner)


@contextmanager
def _failures_as_errors() -> Iterator[None]:
    """torch's exception for a failure on any rank is no Exception: it would pass through every handler."""
    try:
        yield
    except dcp.CheckpointException as failure:
        rank, (error, _) = next(iter(failure.failures.items()))
        raise OSError(f"rank {rank}: {type(error).__name__}: {error}") from failure


class _Reader(dcp.FileSystemReader):
    """torch's reader with metadata that have been read already: torch itself would run any pickle."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._metadata.storage_meta = self._metadata.storage_meta or dcp.metadata.StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata
