"""Lazy reading of recursive checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from recursify.errors import CheckpointError

from .dense_names import DenseNames
from .loading import read_config
from .shards import folder_tensors, shard_files


class RecursiveCheckpoint:
    """The folder of a recursive model, one tensor in memory at a time.

    Args:
        folder: Folder written by ``recursify convert`` or ``save_pretrained``.

    Raises:
        CheckpointError: The config or a shard is damaged, or a tensor is missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_config(folder)
        self.names = DenseNames(self.config)
        self.layout = self.config.layout
        self.tensors = folder_tensors(folder)
        self._shard_of = shard_files(folder)
        if missing := sorted(self.names.parameters.keys() - self.tensors.keys()):
            raise CheckpointError(
                f"'{folder}' lacks {len(missing)} of the model's tensors, first '{missing[0]}'. Convert it again."
            )
        self.dtype = self.tensors[next(iter(self.names.parameters))].dtype

    def read(self, name: str) -> Tensor:
        """Read the tensor ``name`` in the dtype on disk."""
        with safe_open(self.folder / self._shard_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def unrolled(self) -> Iterator[tuple[str, Tensor]]:
        """Read the parameters of the unrolled dense model: dense names and tensors."""
        for name, dense_name in self.names.unshared.items():
            yield dense_name, self.read(name)
        for module in self.names.stored_modules():
            for depth, position in enumerate(self.layout.positions(module.index)):
                for parameter in module.parameters:
                    yield self.names.dense(position, module.path, parameter), module.read(self, parameter, depth)
