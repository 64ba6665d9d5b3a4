"""Header of a ``.gguf`` file: its keys, whose values are parsed when they are asked for, and where its tensors are.

The format is that of ggml's ``docs/gguf.md``, versions 2 and 3. ``gguf.GGUFReader`` makes several NumPy arrays of every
token and merge of the vocabulary: 760,000 of them for Qwen2.5, and half a gigabyte.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Codes of ``struct`` by type of value."""
STRING, ARRAY = 8, 9
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class StoredTensor:
    """Place of a tensor in the file.

    Attributes:
        shape: Shape in PyTorch's order.
        kind: Number of its ``GGMLQuantizationType``.
        offset: First byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


class GgufHeader:
    """Keys and places of the tensors of a ``.gguf`` file, which stays memory-mapped.

    Args:
        path: The file.

    Attributes:
        keys: Offset of the value of every key.
        tensors: Place of every tensor, by name.

    Raises:
        ValueError: The file is damaged, of an unknown version, or has the byte order of another machine.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._data[:4] != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version, num_tensors, num_keys = self._numbers(4, "IQQ")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            raise ValueError("its byte order is big-endian" if swapped else f"it has version {version}")
        self.keys: dict[str, int] = {}
        offset = self._read_keys(24, num_keys)
        self.tensors: dict[str, StoredTensor] = {}
        offset = self._read_tensors(offset, num_tensors)
        alignment = self.value("general.alignment") if "general.alignment" in self.keys else DEFAULT_ALIGNMENT
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"it has general.alignment {alignment!r}")
        self._first_byte = offset + -offset % alignment

    def value(self, key: str) -> Any:
        """Value of a key: a number, a string, or a list of these."""
        offset = self.keys[key]
        return self._parse(offset + 4, *self._numbers(offset, "I"))[0]

    def bytes_of(self, tensor: StoredTensor, num_bytes: int) -> np.ndarray:
        """The bytes of a tensor ``[num_bytes]`` uint8, in the file.

        Raises:
            ValueError: The file ends before it does.
        """
        first = self._first_byte + tensor.offset
        if first + num_bytes > len(self._data):
            raise ValueError(f"it ends at byte {first + num_bytes:,}, and the file at {len(self._data):,}")
        return np.frombuffer(self._data, np.uint8, num_bytes, first)

    def _numbers(self, offset: int, codes: str) -> tuple[Any, ...]:
        return struct.unpack_from("<" + codes, self._data, offset)

    def _text(self, offset: int) -> tuple[str, int]:
        """A string, and the offset behind it."""
        end = self._end_of_text(offset)
        return self._data[offset + 8 : end].decode(), end

    def _end_of_text(self, offset: int) -> int:
        return self._within(offset + 8 + self._numbers(offset, "Q")[0])

    def _within(self, offset: int) -> int:
        if offset > len(self._data):
            raise ValueError(f"it has {len(self._data):,} bytes, but its header goes on to byte {offset:,}")
        return offset

    def _parse(self, offset: int, kind: int) -> tuple[Any, int]:
        """A value, and the offset behind it."""
        if kind in SCALARS:
            return self._numbers(offset, SCALARS[kind])[0], offset + struct.calcsize(SCALARS[kind])
        if kind == STRING:
            return self._text(offset)
        inner, count = self._numbers(offset, "IQ")
        offset += 12
        if inner in SCALARS:
            codes = f"{count}{SCALARS[inner]}"
            return list(self._numbers(offset, codes)), offset + struct.calcsize(codes)
        values = []
        for _ in range(count):
            value, offset = self._parse(offset, inner)
            values.append(value)
        return values, offset

    def _skip(self, offset: int, kind: int) -> int:
        """The offset behind a value."""
        if kind in SCALARS:
            return self._within(offset + struct.calcsize(SCALARS[kind]))
        if kind == STRING:
            return self._end_of_text(offset)
        if kind != ARRAY:
            raise ValueError(f"it has a value of the unknown type {kind}")
        inner, count = self._numbers(offset, "IQ")
        offset += 12
        if inner in SCALARS:
            return self._within(offset + count * struct.calcsize(SCALARS[inner]))
        for _ in range(count):
            offset = self._skip(offset, inner)
        return offset

    def _read_keys(self, offset: int, count: int) -> int:
        for _ in range(count):
            key, offset = self._text(offset)
            if key in self.keys:
                raise ValueError(f"it has the key '{key}' twice")
            self.keys[key] = offset
            offset = self._skip(offset + 4, *self._numbers(offset, "I"))
        return offset

    def _read_tensors(self, offset: int, count: int) -> int:
        for _ in range(count):
            name, offset = self._text(offset)
            if name in self.tensors:
                raise ValueError(f"it has the tensor '{name}' twice")
            (num_dimensions,) = self._numbers(offset, "I")
            *shape, kind, place = self._numbers(offset + 4, f"{num_dimensions}QIQ")
            self.tensors[name] = StoredTensor(tuple(reversed(shape)), kind, place)
            offset += 4 + 8 * num_dimensions + 12
        return offset
