"""A checkpoint's metadata through the list of harmless names: what is read, and every way to be refused."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_rlvr.config import ConfigError
from megatron_rlvr.weights.megatron_folder import (
    MegatronFolder,
    checked_metadata,
    is_megatron_folder,
    model_folder,
    read_metadata,
)

STACKED = torch.arange(24, dtype=torch.float32).reshape(3, 4, 2)


class Malicious:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self):
        return os.mkdir, (str(self.touched),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One tensor in one chunk, one object, a common.pt: as torch writes them."""
    state = {"stacked": STACKED, "half": torch.ones(5, dtype=torch.bfloat16), "object": "text"}
    folder = tmp_path / "policy"
    checkpoint.save(state, checkpoint_id=str(folder), no_dist=True)
    torch.save({}, folder / "common.pt")
    return folder


def rewrite(folder: Path, change: Callable[[Metadata], object]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_tensors_and_their_parts_are_read(folder: Path) -> None:
    assert is_megatron_folder(folder) and not is_megatron_folder(folder.parent)
    assert model_folder(folder.parent) == folder == model_folder(folder)
    checked_metadata(folder)
    with MegatronFolder(folder) as opened:
        assert opened.shape("stacked") == (3, 4, 2) and set(opened.tensors) == {"stacked", "half"}
        assert opened.tensor("stacked").equal(STACKED)
        assert opened.tensor("half").equal(torch.ones(5, dtype=torch.bfloat16))
        with pytest.raises(ConfigError, match="tensor absent is missing"):
            opened.tensor("absent")


def test_a_pickle_that_asks_for_more_is_never_run(folder: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    rewrite(folder, lambda metadata: setattr(metadata, "planner_data", Malicious(touched)))
    with pytest.raises(ConfigError, match=r"\.metadata cannot be read .*it asks for .*mkdir"):
        read_metadata(folder)
    for name in ("Metadata.__init__.__globals__", "load"):  # names behind allowed ones, and others of torch
        (folder / ".metadata").write_bytes(b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name.encode() + b"\x93.")
        with pytest.raises(ConfigError, match="it asks for torch"):
            read_metadata(folder)
    assert not touched.exists()


@pytest.mark.parametrize("where", ["object", "tensor", "common.pt"])
def test_stored_objects_are_never_trusted(folder: Path, tmp_path: Path, where: str) -> None:
    touched, archive = tmp_path / "touched", io.BytesIO()
    torch.save(Malicious(touched), archive)
    if where == "common.pt":
        (folder / where).write_bytes(archive.getvalue())
    else:
        (folder / "evil.distcp").write_bytes(archive.getvalue())
        entry = MetadataIndex("object") if where == "object" else MetadataIndex("half", [0])

        def point(metadata: Metadata) -> None:
            info = next(info for known, info in metadata.storage_data.items() if known == entry)
            info.relative_path, info.offset, info.length = "evil.distcp", 0, len(archive.getvalue())

        rewrite(folder, point)
    with pytest.raises(ConfigError, match="cannot be read"):
        if where == "tensor":
            with MegatronFolder(folder) as opened:
                opened.tensor("half")
        checked_metadata(folder)
    assert not touched.exists()


def test_damage_is_named(folder: Path, tmp_path: Path) -> None:
    (file,) = folder.glob("*.distcp")

    def outside(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = "../" + file.name

    shutil.copy(file, tmp_path / file.name)
    damages: dict[str, Callable[[Path], object]] = {
        "metadata points to .*outside of its folder": lambda at: rewrite(at, outside),
        f"{file.name} is missing": lambda at: (at / file.name).unlink(),
        f"{file.name} is cut short": lambda at: os.truncate(at / file.name, file.stat().st_size - 1),
        "metadata cannot be read": lambda at: os.truncate(at / ".metadata", 100),
        "metadata holds no checkpoint's metadata": lambda at: (at / ".metadata").write_bytes(pickle.dumps({})),
        "does not say where object is": lambda at: rewrite(
            at, lambda metadata: metadata.storage_data.pop(MetadataIndex("object"))
        ),
        "of tensor stacked parts are missing": lambda at: rewrite(
            at, lambda metadata: metadata.state_dict_metadata["stacked"].chunks.clear()
        ),
        "half at .0. is not torch.float16": lambda at: rewrite(
            at,
            lambda metadata: setattr(metadata.state_dict_metadata["half"].properties, "dtype", torch.float16),
        ),
    }
    for number, (message, damage) in enumerate(damages.items()):
        broken = tmp_path / "broken" / str(number)
        shutil.copytree(folder, broken)
        damage(broken)
        with pytest.raises(ConfigError, match=message), MegatronFolder(broken) as opened:
            checked_metadata(broken)
            for name in opened.tensors:
                opened.tensor(name)


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (file,) = folder.glob("*.distcp")
    file.rename(tmp_path / file.name)
    file.symlink_to(tmp_path / file.name)
    with pytest.raises(ConfigError, match="is missing"):
        read_metadata(folder)


def test_an_object_entry_without_bytes_is_refused(folder: Path) -> None:
    rewrite(folder, lambda metadata: metadata.state_dict_metadata.update(ghost=BytesStorageMetadata()))
    with pytest.raises(ConfigError, match="does not say where ghost is"):
        checked_metadata(folder)
