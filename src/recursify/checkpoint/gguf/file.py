"""An open ``.gguf`` file: metadata whose reading is tracked, and tensors that are dequantized on demand."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recursify.errors import CheckpointError, UnsupportedModelError

from .header import GgufHeader

ELEMENTS_AT_ONCE = 2**22
"""Elements that are dequantized in one call of the ``gguf`` package, which holds them several times."""


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
        CheckpointError: The package ``gguf`` is missing or does not know a quantization, the file is damaged, or one of
            several parts.
        UnsupportedModelError: It holds something else than a model.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise CheckpointError(
                f"'{path}' cannot be read without the Python package 'gguf', which is not installed. Run: "
                f"pip install 'recursify[gguf]'"
            ) from error
        try:
            self._header = GgufHeader(path)
            self.architecture = str(self._header.value("general.architecture"))
        except (OSError, ValueError, LookupError, RecursionError, struct.error) as error:
            raise CheckpointError(
                f"'{path}' cannot be read as a GGUF language model: {type(error).__name__}: {error}. The file is "
                f"truncated or damaged: fetch it again."
            ) from error
        self.shapes = {name: tensor.shape for name, tensor in self._header.tensors.items()}
        self._unread = {key for key in self._header.keys if key.startswith(f"{self.architecture}.")}
        self._check_kind()
        self._check_tensors()

    def _check_kind(self) -> None:
        kind = self.get("general.type", "model")
        if kind != "model":
            raise UnsupportedModelError(f"'{self.path}' has general.type '{kind}', so it is not a model.")
        parts = self.get("split.count", 1)
        if parts > 1:
            raise CheckpointError(
                f"'{self.path}' is one of {parts} parts of a model. Join them first: llama-gguf-split --merge FIRST OUT"
            )

    def _check_tensors(self) -> None:
        """Check that every tensor is in the file whole, in a quantization that can be read."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        for name, tensor in self._header.tensors.items():
            try:
                kind = GGMLQuantizationType(tensor.kind)
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except (ValueError, LookupError, NotImplementedError) as error:
                raise CheckpointError(
                    f"'{name}' in '{self.path}' is stored in a quantization that the package gguf does not dequantize: "
                    f"{error}. Fetch the model in another quantization, or run: pip install --upgrade gguf"
                ) from error
            try:
                self._rows(name)
            except (ValueError, IndexError) as error:
                raise CheckpointError(
                    f"'{self.path}' does not have all of the tensor '{name}': {error}. The file is truncated or "
                    f"damaged: fetch it again."
                ) from error

    def _rows(self, name: str) -> np.ndarray:
        """Rows of a tensor as they are in the file, ``[rows, bytes]`` uint8."""
        from gguf import GGMLQuantizationType
        from gguf.quants import quant_shape_to_byte_shape

        tensor = self._header.tensors[name]
        shape = quant_shape_to_byte_shape(tensor.shape, GGMLQuantizationType(tensor.kind))
        return self._header.bytes_of(tensor, math.prod(shape)).reshape(-1, shape[-1])

    def get(self, key: str, default: Any = None) -> Any:
        """Value of ``key``, or ``default`` if the file does not have it."""
        self._unread.discard(key)
        return self._header.value(key) if key in self._header.keys else default

    def own(self, key: str, default: Any = None) -> Any:
        """Value of ``key`` in the namespace of the architecture, or ``default``."""
        return self.get(f"{self.architecture}.{key}", default)

    def unread(self) -> list[str]:
        """Keys of the architecture that were never read, sorted."""
        return sorted(self._unread)

    def read(self, name: str) -> Tensor:
        """Dequantized tensor ``name``, float32, a copy."""
        from gguf import GGMLQuantizationType, dequantize

        tensor, rows = self._header.tensors[name], self._rows(name)
        values = torch.empty(tensor.shape)
        output = values.view(-1, tensor.shape[-1]).numpy()
        step = max(1, ELEMENTS_AT_ONCE // tensor.shape[-1])
        for first in range(0, len(rows), step):
            output[first : first + step] = dequantize(rows[first : first + step], GGMLQuantizationType(tensor.kind))
        return values
