"""Writing a checkpoint: safetensors shards filled in any order, in a folder that appears only when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from recursify.errors import OutputError

from .dense_checkpoint import INDEX_FILE, SINGLE_FILE, TensorInfo

MAX_SHARD_BYTES = 5 * 10**9
"""Shard size, as in ``save_pretrained``."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


class ShardedCheckpoint:
    """Safetensors shards whose headers are written first, and whose tensors follow one at a time, in any order.

    The library's own writer wants a whole shard in memory. A conversion knows every shape before it starts, so it can
    write the headers at once and then hold one tensor at a time; what has been written can be read back, which is how
    drift correction revisits a shared weight without keeping it.

    Args:
        folder: Where the shards go; it exists and is empty of weights.
        tensors: Every tensor to be written, in the order in which they will lie on disk.
        max_shard_bytes: A shard is closed before it would grow beyond this.
    """

    def __init__(self, folder: Path, tensors: dict[str, TensorInfo], *, max_shard_bytes: int = MAX_SHARD_BYTES):
        self.folder = folder
        self.tensors = tensors
        self._unwritten = set(tensors)
        self._places: dict[str, tuple[Path, int]] = {}
        shards = _split(tensors, max_shard_bytes)
        names = (
            [SINGLE_FILE]
            if len(shards) == 1
            else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        )
        for file_name, shard in zip(names, shards, strict=True):
            self._write_header(folder / file_name, shard)
        if len(shards) > 1:
            weight_map = {name: self._places[name][0].name for name in tensors}
            total = sum(info.num_bytes for info in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write_header(self, file: Path, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            info = self.tensors[name]
            header[name] = {
                "dtype": _NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.num_bytes],
            }
            offset += info.num_bytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with open(file, "wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            stream.truncate(8 + len(encoded) + offset)
        start = 8 + len(encoded)
        for name in names:
            self._places[name] = (file, start)
            start += self.tensors[name].num_bytes

    def write(self, name: str, tensor: Tensor) -> None:
        """Write ``tensor`` under ``name``, cast to the dtype announced; a later call replaces an earlier one."""
        info = self.tensors[name]
        assert tuple(tensor.shape) == info.shape, f"{name}: {tuple(tensor.shape)} is not {info.shape}"
        file, offset = self._places[name]
        data = tensor.detach().to("cpu", info.dtype).contiguous().reshape(-1).view(torch.uint8)
        with open(file, "r+b") as stream:
            stream.seek(offset)
            stream.write(data.numpy().data)
        self._unwritten.discard(name)

    def read(self, name: str) -> Tensor:
        """What was written under ``name``, in the dtype on disk."""
        assert name not in self._unwritten, f"{name} was never written"
        file, offset = self._places[name]
        info = self.tensors[name]
        data = torch.empty(info.num_bytes, dtype=torch.uint8)
        with open(file, "rb") as stream:
            stream.seek(offset)
            stream.readinto(data.numpy().data)
        return data.view(info.dtype).reshape(info.shape)

    def finish(self) -> None:
        """Assert that every announced tensor was written."""
        assert not self._unwritten, f"never written: {sorted(self._unwritten)[:5]}"


def _split(tensors: dict[str, TensorInfo], max_shard_bytes: int) -> list[list[str]]:
    """Tensor names by shard, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.num_bytes
    return shards


def check_target(target: Path, source: Path | None, *, overwrite: bool, num_bytes: int) -> None:
    """Refuse a target that cannot be written, before any work is done.

    Raises:
        OutputError: It exists (without ``overwrite``), lies inside the source folder or around it, or there is no room.
    """
    target = target.absolute()
    if source is not None and source.is_dir():
        inside, around = (
            source.resolve() in [target.resolve(), *target.resolve().parents],
            (target.resolve() in source.resolve().parents),
        )
        if inside or around:
            raise OutputError(f"The output '{target}' and the input '{source}' contain one another. Choose another -o.")
    if target.exists() and not overwrite:
        raise OutputError(f"'{target}' exists. Choose another -o, or pass --overwrite to replace it.")
    if target.exists() and not target.is_dir():
        raise OutputError(f"'{target}' is a file, and a model is a folder. Choose another -o.")
    existing = next(parent for parent in target.parents if parent.exists())
    if not os.access(existing, os.W_OK):
        raise OutputError(f"'{existing}' is not writable. Choose another -o.")
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OutputError(
            f"'{existing}' has {free / 1e9:.2f} GB free, and the model needs {num_bytes / 1e9:.2f} GB. Free some, or "
            f"choose another -o."
        )


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name when the block ends well, and vanishes when it does not.

    A process that is killed leaves only a dot-folder, which the next run for the same target removes. Replacing a
    model moves the old one aside first; if that is where a run dies, the next one puts it back.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target)
    scratch = target.parent / f".{target.name}.recursify-{os.getpid()}"
    aside = target.parent / f".{target.name}.replaced-{os.getpid()}"
    scratch.mkdir()
    try:
        yield scratch
        for file in scratch.rglob("*"):
            if file.is_file():
                _sync(file)
        if target.exists():
            assert overwrite
            target.rename(aside)
        scratch.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _recover(target: Path) -> None:
    """Clear away what dead runs for ``target`` left, and put back a model that one had moved aside."""
    for left in target.parent.glob(f".{target.name}.replaced-*"):
        if target.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(target)
    for left in target.parent.glob(f".{target.name}.recursify-*"):
        pid = left.name.rpartition("-")[2]
        if pid == str(os.getpid()) or not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
