"""An open ``.gguf`` file: metadata whose reading is tracked, and tensors that are dequantized on demand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recursify.errors import CheckpointError, UnsupportedModelError


class GgufFile:
    """Header of a ``.gguf`` file, and its tensors on demand.

    Every key that is read is marked, so that those which nobody reads can be found.

    Args:
        path: The file.

    Attributes:
        path: The file.
        architecture: Name of the architecture, the namespace of its keys.
        shapes: Shape of every tensor by its name, in PyTorch's order.

    Raises:
        CheckpointError: The package ``gguf`` is missing, the file is damaged, or one of several parts.
        UnsupportedModelError: It holds something else than a model.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise CheckpointError(
                f"'{path}' cannot be read without the Python package 'gguf', which is not installed. Run: "
                f"pip install 'recursify[gguf]'"
            ) from error
        try:
            self._reader = GGUFReader(str(path))
            self.architecture = str(self._reader.fields["general.architecture"].contents())
            self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        except Exception as error:  # the reader raises errors of any type
            raise CheckpointError(
                f"'{path}' cannot be read as a GGUF language model: {type(error).__name__}: {error}. The file is "
                f"truncated or damaged: fetch it again."
            ) from error
        self.shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
        self._unread = {key for key in self._reader.fields if key.startswith(f"{self.architecture}.")}
        self._check_kind()

    def _check_kind(self) -> None:
        kind = self.get("general.type", "model")
        if kind != "model":
            raise UnsupportedModelError(f"'{self.path}' has general.type '{kind}', so it is not a model.")
        parts = self.get("split.count", 1)
        if parts > 1:
            raise CheckpointError(
                f"'{self.path}' is one of {parts} parts of a model. Join them first: llama-gguf-split --merge FIRST OUT"
            )
        if self._reader.byte_order != "I":
            raise CheckpointError(f"'{self.path}' has the byte order of another machine. Fetch a little-endian file.")

    def get(self, key: str, default: Any = None) -> Any:
        """Value of ``key``, or ``default`` if the file does not have it."""
        self._unread.discard(key)
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def own(self, key: str, default: Any = None) -> Any:
        """Value of ``key`` in the namespace of the architecture, or ``default``."""
        return self.get(f"{self.architecture}.{key}", default)

    def unread(self) -> list[str]:
        """Keys of the architecture that were never read, sorted."""
        return sorted(self._unread)

    def read(self, name: str) -> Tensor:
        """Dequantized tensor ``name``, float32, a copy.

        Raises:
            CheckpointError: Its quantization is unknown to the ``gguf`` package.
        """
        from gguf import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"'{name}' in '{self.path}' is stored as {tensor.tensor_type.name}, which the package gguf does not "
                f"dequantize: {error}. Fetch the model in another quantization."
            ) from error
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(self.shapes[name])
