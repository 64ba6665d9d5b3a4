"""Lazy reading of recursive checkpoints by module and depth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from recursify.errors import CheckpointError
from recursify.modeling import LayoutError, RecursiveConfig

from .dense_names import DenseNames, StoredModule
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
        try:
            self.config = RecursiveConfig.from_pretrained(folder)
            self.names = DenseNames(self.config)
        except (ValueError, OSError, LayoutError) as error:
            raise CheckpointError(f"'{folder}' has a config that does not load: {error}") from error
        self.layout = self.config.layout
        self.tensors = folder_tensors(folder)
        self._shard_of = shard_files(folder)
        missing = sorted(self.names.parameters.keys() - self.tensors.keys())
        if missing:
            raise CheckpointError(
                f"'{folder}' lacks {len(missing)} of the model's tensors, first '{missing[0]}'. Convert it again."
            )
        self.dtype = self.tensors[next(iter(self.names.parameters))].dtype

    def read(self, name: str) -> Tensor:
        """Read the tensor ``name`` in the dtype on disk."""
        with safe_open(self.folder / self._shard_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def read_depth(self, module: StoredModule, parameter: str, depth: int) -> Tensor:
        """Dense parameter of ``module`` at ``depth``; merged weights are in float32 or better."""
        if not module.is_linear:
            is_tied = f"{module.name}.copies.{depth}.{parameter}" not in self.tensors
            return self.read(f"{module.name}.copies.{0 if is_tied else depth}.{parameter}")
        if parameter == "bias":
            biases = self.read(f"{module.name}.bias")
            return biases[depth if len(biases) > 1 else 0]
        weight = self.read(f"{module.name}.linear.weight")
        if not module.rank:
            return weight
        b, a = self.read_factors(module, depth)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(dtype) + b.to(dtype) @ a.to(dtype)

    def read_factors(self, module: StoredModule, depth: int) -> tuple[Tensor, Tensor]:
        """LoRA factors ``(B [O, r], A [r, I])`` of one depth."""
        return self.read(f"{module.name}.lora_b")[depth], self.read(f"{module.name}.lora_a")[depth]

    def unrolled(self) -> Iterator[tuple[str, str, StoredModule | None, int]]:
        """Iterate over the parameters of the unrolled dense model.

        Yields:
            ``(dense name, recursive name, None, 0)`` outside the shared block, and ``(dense name, parameter, module,
            depth)`` inside it.
        """
        for name, dense_name in self.names.unshared.items():
            yield dense_name, name, None, 0
        for index in range(self.layout.block_size):
            for module in self.names.stored_modules(index):
                for depth, position in enumerate(self.layout.positions(index)):
                    for parameter in module.parameters:
                        yield self.names.dense(position, module.path, parameter), parameter, module, depth
