"""Writing of checkpoints: safetensors shards filled in any order, in a folder that appears when it is complete."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from recursify.errors import OutputError, RecursifyError

from .shards import DTYPES, INDEX_FILE, SINGLE_FILE, TensorInfo

MAX_SHARD_BYTES = 5 * 10**9
"""Shard size, as in ``save_pretrained``."""

UNFINISHED_FILE = "unfinished.safetensors"
"""File of a scratch folder that an interrupted run can be resumed from."""

logger = logging.getLogger(__name__)

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
        unwritten: Value of the attribute when an interrupted run wrote into the same folder, to go on with its shards.

    Attributes:
        unwritten: Names of the tensors that were not written yet, with an index in brackets for single rows.
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, TensorInfo],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        unwritten: set[str] | None = None,
    ):
        self.folder = folder
        self.tensors = tensors
        self.unwritten = set(tensors) if unwritten is None else unwritten
        self._places: dict[str, tuple[Path, int]] = {}
        shards = _split(tensors, max_shard_bytes)
        for number, shard in enumerate(shards, start=1):
            name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._write_header(folder / name, shard, keep=unwritten is not None)
        if len(shards) > 1:
            weight_map = {name: self._places[name][0].name for name in tensors}
            total = sum(info.num_bytes for info in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write_header(self, file: Path, names: list[str], *, keep: bool) -> None:
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
        if not keep:
            with open(file, "wb") as stream:
                stream.write(len(encoded).to_bytes(8, "little") + encoded)
                stream.truncate(8 + len(encoded) + offset)
        self._places |= {name: (file, 8 + len(encoded) + start) for name, start in starts.items()}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write ``tensor`` under ``name``, cast to the dtype in the header; a later call replaces an earlier one."""
        self._write(name, self.tensors[name].shape, 0, tensor)
        self.unwritten.discard(name)

    def write_row(self, name: str, index: int, tensor: Tensor) -> None:
        """Write ``tensor`` as entry ``index`` of the first dimension of ``name``, as :meth:`write` does."""
        shape = self.tensors[name].shape
        self._write(name, shape[1:], index, tensor)
        if name in self.unwritten:
            self.unwritten.remove(name)
            self.unwritten.update(f"{name}[{row}]" for row in range(shape[0]))
        self.unwritten.discard(f"{name}[{index}]")

    def _write(self, name: str, shape: tuple[int, ...], index: int, tensor: Tensor) -> None:
        assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)} is not {shape}"
        file, offset = self._places[name]
        data = tensor.detach().to("cpu", self.tensors[name].dtype).contiguous().reshape(-1).view(torch.uint8)
        with open(file, "r+b") as stream:
            stream.seek(offset + index * data.numel())
            stream.write(data.numpy().data)

    def read(self, name: str) -> Tensor:
        """Read back a written tensor in the dtype on disk."""
        assert name not in self.unwritten, f"{name} was never written"
        file, offset = self._places[name]
        info = self.tensors[name]
        data = torch.empty(info.num_bytes, dtype=torch.uint8)
        with open(file, "rb") as stream:
            stream.seek(offset)
            stream.readinto(data.numpy().data)
        return data.view(info.dtype).reshape(info.shape)

    def sync(self) -> None:
        """Wait until all tensors so far are on the disk."""
        for file in {file for file, _ in self._places.values()}:
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())

    def finish(self) -> None:
        """Assert that every tensor was written."""
        assert not self.unwritten, f"never written: {sorted(self.unwritten)[:5]}"


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
def atomic_folder(target: Path, *, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """Scratch folder that is renamed to ``target`` at the end of the block, and removed after an exception.

    A killed process leaves a dot-folder, which the next run for the same target removes or, with ``resume``, goes on
    with. So does an interruption or a full disk, if the folder has an ``UNFINISHED_FILE``. To replace a model, the old
    one is moved aside first; if the process is killed at that point, the next run restores it.

    Raises:
        OutputError: With ``resume``, there is no interrupted run.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.recursify-{os.getpid()}"
    aside = target.parent / f".{target.name}.replaced-{os.getpid()}"
    if resume:
        _find_unfinished(target).rename(scratch)
    _recover(target, keep=scratch if resume else None)
    scratch.mkdir(exist_ok=resume)
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
    except BaseException as error:
        is_permanent = isinstance(error, RecursifyError) and not isinstance(error, OutputError)
        if is_permanent or not (scratch / UNFINISHED_FILE).exists():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            logger.warning("'%s' is unfinished. Go on with --resume, or start again without it.", target)
        raise


def _find_unfinished(target: Path) -> Path:
    """Scratch folder of an interrupted run for ``target``."""
    for scratch in target.parent.glob(f".{target.name}.recursify-*"):
        if (scratch / UNFINISHED_FILE).exists() and _is_stale(scratch):
            return scratch
    raise OutputError(
        f"'{target}' has no interrupted conversion to resume: none was started, or it had not finished its first "
        f"layer. Omit --resume to start one."
    )


def _recover(target: Path, keep: Path | None = None) -> None:
    """Remove scratch folders of killed runs for ``target``, and restore a model that one had moved aside."""
    for aside in target.parent.glob(f".{target.name}.replaced-*"):
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)
    for scratch in target.parent.glob(f".{target.name}.recursify-*"):
        if scratch != keep and _is_stale(scratch):
            shutil.rmtree(scratch, ignore_errors=True)


def _is_stale(scratch: Path) -> bool:
    """Tell whether the run that a scratch folder belongs to has ended."""
    pid = int(scratch.name.rpartition("-")[2])
    return pid == os.getpid() or not _is_running(pid)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
