"""Folders of safetensors shards: names, shapes and dtypes of their tensors, read from the headers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from recursify.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Floating-point dtypes that we read, by their names in safetensors; float8 with scales alone."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_parameters * self.dtype.itemsize


def shard_files(folder: Path) -> dict[str, str]:
    """Mapping from tensor names on disk to shard file names.

    As in transformers, a single file is preferred to an index, and every tensor of a shard counts, in the index or not.

    Raises:
        CheckpointError: A shard is missing, the index is damaged, or there are no safetensors.
    """
    if (folder / SINGLE_FILE).exists():
        return dict.fromkeys(_read_header(folder / SINGLE_FILE), SINGLE_FILE)
    index = folder / INDEX_FILE
    if index.exists():
        try:
            shard_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"'{index}' is damaged: {error}. Fetch it again.") from error
        if missing := sorted({shard for shard in shard_of.values() if not (folder / shard).exists()}):
            raise CheckpointError(
                f"'{folder}' lacks {len(missing)} of its shards: {', '.join(missing)}. Fetch them again."
            )
        left_out = {name: shard for shard in set(shard_of.values()) for name in _read_header(folder / shard)}
        return {**left_out, **shard_of}
    if pickles := sorted(file.name for pattern in PICKLE_PATTERNS for file in folder.glob(pattern)):
        raise CheckpointError(
            f"'{folder}' has only pickled weights ({', '.join(pickles[:3])}), and a pickle can run any code. Convert "
            f'it once where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise CheckpointError(f"'{folder}' has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}. Fetch the model again.")


def folder_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Floating-point tensors of a folder; errors are those of :func:`shard_files` and :func:`read_headers`."""
    tensors = read_headers(folder, shard_files(folder))
    return {name: info for name, info in tensors.items() if isinstance(info, TensorInfo)}


def read_headers(folder: Path, shard_of: dict[str, str]) -> dict[str, TensorInfo | str]:
    """Tensors of the shards; for a dtype that is not in :data:`DTYPES`, its name in safetensors.

    Raises:
        CheckpointError: A shard is truncated, or lacks a tensor of the index.
    """
    tensors: dict[str, TensorInfo | str] = {}
    for shard in sorted(set(shard_of.values())):
        tensors.update(_read_header(folder / shard))
    if missing := sorted(name for name in shard_of if name not in tensors):
        raise CheckpointError(
            f"{INDEX_FILE} lists {len(missing)} tensors that the shards do not have, first '{missing[0]}' in "
            f"{shard_of[missing[0]]}. The download is incomplete or mixed: fetch the model again."
        )
    return tensors


def _read_header(shard: Path) -> dict[str, TensorInfo | str]:
    try:
        with safe_open(shard, framework="pt") as file:
            tensors: dict[str, TensorInfo | str] = {}
            for name in file.keys():  # noqa: SIM118  (not a mapping: it has keys() only)
                view = file.get_slice(name)
                dtype = DTYPES.get(view.get_dtype())
                tensors[name] = TensorInfo(tuple(view.get_shape()), dtype) if dtype else view.get_dtype()
            return tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"'{shard}' is truncated or not a safetensors file ({error}). Fetch the shard again."
        ) from error
