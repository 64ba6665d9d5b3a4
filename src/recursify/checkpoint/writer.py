"""Writing of checkpoints: safetensors shards filled in any order, in a folder that appears when it is complete."""

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

from .shards import DTYPES, INDEX_FILE, SINGLE_FILE, TensorInfo

MAX_SHARD_BYTES = 5 * 10**9
"""Shard size, as in ``save_pretrained``."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardedCheckpoint:
    """Safetensors shards whose headers are written first, and whose tensors follow one at a time, in any order.

    The library's own writer needs a whole shard in memory. A conversion knows every shape before it starts, so it
    writes the headers first and then keeps one tensor in memory at a time. Written tensors can be read back, by which
    drift correction revisits shared weights without keeping them.

    Args:
        folder: Existing folder without weights.
        tensors: Tensors to be written, in the order on disk.
        max_shard_bytes: Size limit of a shard.
    """

    def __init__(self, folder: Path, tensors: dict[str, TensorInfo], *, max_shard_bytes: int = MAX_SHARD_BYTES):
        self.folder = folder
        self.tensors = tensors
        self._unwritten = set(tensors)
        self._unwritten_rows: dict[str, set[int]] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        shards = _split(tensors, max_shard_bytes)
        for number, shard in enumerate(shards, start=1):
            name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._write_header(folder / name, shard)
        if len(shards) > 1:
            weight_map = {name: self._places[name][0].name for name in tensors}
            total = sum(info.num_bytes for info in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write_header(self, file: Path, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, offset = {}, 0
        for name in names:
            info, starts[name] = self.tensors[name], offset
            offset += info.num_bytes
            header[name] = {
                "dtype": _NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [starts[name], offset],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with open(file, "wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            stream.truncate(8 + len(encoded) + offset)
        self._places |= {name: (file, 8 + len(encoded) + start) for name, start in starts.items()}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write ``tensor`` under ``name``, cast to the dtype in the header; a later call replaces an earlier one."""
        self._write(name, self.tensors[name].shape, 0, tensor)
        self._unwritten.discard(name)

    def write_row(self, name: str, index: int, tensor: Tensor) -> None:
        """Write ``tensor`` as entry ``index`` of the first dimension of ``name``, as :meth:`write` does."""
        shape = self.tensors[name].shape
        self._write(name, shape[1:], index, tensor)
        rows = self._unwritten_rows.setdefault(name, set(range(shape[0])))
        rows.discard(index)
        if not rows:
            self._unwritten.discard(name)

    def _write(self, name: str, shape: tuple[int, ...], index: int, tensor: Tensor) -> None:
        assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)} is not {shape}"
        file, offset = self._places[name]
        data = tensor.detach().to("cpu", self.tensors[name].dtype).contiguous().reshape(-1).view(torch.uint8)
        with open(file, "r+b") as stream:
            stream.seek(offset + index * data.numel())
            stream.write(data.numpy().data)

    def read(self, name: str) -> Tensor:
        """Read back a written tensor in the dtype on disk."""
        assert name not in self._unwritten, f"{name} was never written"
        file, offset = self._places[name]
        info = self.tensors[name]
        data = torch.empty(info.num_bytes, dtype=torch.uint8)
        with open(file, "rb") as stream:
            stream.seek(offset)
            stream.readinto(data.numpy().data)
        return data.view(info.dtype).reshape(info.shape)

    def finish(self) -> None:
        """Assert that every tensor was written."""
        assert not self._unwritten, f"never written: {sorted(self._unwritten)[:5]}"


def _split(tensors: dict[str, TensorInfo], max_shard_bytes: int) -> list[list[str]]:
    """Names of each shard's tensors, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in tensors.items():
        size += info.num_bytes
        if shards[-1] and size > max_shard_bytes:
            shards.append([])
            size = info.num_bytes
        shards[-1].append(name)
    return shards


def check_target(target: Path, source: Path | None, *, overwrite: bool, num_bytes: int) -> None:
    """Check that a folder of ``num_bytes`` can be written, before any work is done; ``source`` is the model to read.

    Raises:
        OutputError: The target exists (without ``overwrite``), overlaps with the source, or does not fit on the disk.
    """
    target = target.absolute()
    if source is not None and source.is_dir():
        inner, outer = target.resolve(), source.resolve()
        if inner == outer or outer in inner.parents or inner in outer.parents:
            raise OutputError(f"The output '{target}' and the input '{source}' overlap. Choose another -o.")
    if target.exists() and not overwrite:
        raise OutputError(f"'{target}' exists. Choose another -o, or pass --overwrite to replace it.")
    if target.exists() and not target.is_dir():
        raise OutputError(f"'{target}' is a file, but a model is a folder. Choose another -o.")
    existing = next(parent for parent in target.parents if parent.exists())
    if not os.access(existing, os.W_OK):
        raise OutputError(f"'{existing}' is not writable. Choose another -o.")
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OutputError(
            f"'{existing}' has {free / 1e9:.2f} GB free, but the model needs {num_bytes / 1e9:.2f} GB. Free some "
            f"space, or choose another -o."
        )


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Scratch folder that is renamed to ``target`` at the end of the block, and removed after an exception.

    A killed process leaves a dot-folder, which the next run for the same target removes. To replace a model, the old
    one is moved aside first; if the process is killed at that point, the next run restores it.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target)
    scratch = target.parent / f".{target.name}.recursify-{os.getpid()}"
    aside = target.parent / f".{target.name}.replaced-{os.getpid()}"
    scratch.mkdir()
    try:
        yield scratch
        for file in filter(Path.is_file, scratch.rglob("*")):
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        if target.exists():
            assert overwrite
            target.rename(aside)
        scratch.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _recover(target: Path) -> None:
    """Remove scratch folders of killed runs for ``target``, and restore a model that one had moved aside."""
    for aside in target.parent.glob(f".{target.name}.replaced-*"):
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)
    for scratch in target.parent.glob(f".{target.name}.recursify-*"):
        pid = scratch.name.rpartition("-")[2]
        if pid == str(os.getpid()) or not _is_running(int(pid)):
            shutil.rmtree(scratch, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
