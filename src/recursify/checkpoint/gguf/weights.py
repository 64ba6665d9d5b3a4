"""Parameters of a dense family from the tensors of a ``.gguf``."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recursify.errors import CheckpointError, UnsupportedModelError

from .architectures import Architecture
from .config import BIASES
from .file import GgufFile
from .rope import ROPE_TENSORS

IGNORED = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?")
"""Tensors of old files that follow from the config."""

SEPARATE = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Source:
    """Place of a parameter in a file.

    Attributes:
        shape: Shape of the parameter.
        parts: Name, and first and last row, of the tensors that make it up; none for a bias of zeros.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int, int], ...]


class GgufWeights:
    """Parameters of a model in a ``.gguf``; names and shapes are checked at once, values read on demand.

    Args:
        file: The open file.
        architecture: Architecture of the file.
        skeleton: Model of the family, on the meta device.

    Attributes:
        sources: Place of each parameter, by its name in transformers; without a tied head.

    Raises:
        CheckpointError: A tensor is missing, or has the wrong shape; or the package ``gguf`` is too old.
        UnsupportedModelError: The file has a tensor that the family does not.
    """

    def __init__(self, file: GgufFile, architecture: Architecture, skeleton: PreTrainedModel):
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        self._file, self._architecture, self._config = file, architecture, skeleton.config
        number = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == file.architecture), None)
        if number is None:
            raise CheckpointError(
                f"'{file.path}' has the architecture '{file.architecture}', which the installed package gguf does not "
                f"know. Run: pip install --upgrade gguf"
            )
        self._names = get_tensor_name_map(number, self._config.num_hidden_layers)
        self.sources = {name: self._source(name, tuple(p.shape)) for name, p in skeleton.named_parameters()}
        used = {part[0] for source in self.sources.values() for part in source.parts} | ROPE_TENSORS
        if unknown := [name for name in file.shapes if name not in used and not IGNORED.fullmatch(name)]:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise UnsupportedModelError(
                f"'{file.path}' has tensors that {self._config.model_type} does not have in transformers: "
                f"{', '.join(unknown[:3])}{more}. Reading it without them would make another model; convert the "
                f"original checkpoint instead."
            )

    def read(self, name: str) -> Tensor:
        """Value of parameter ``name``, float32, in transformers' layout."""
        source = self.sources[name]
        if not source.parts:
            return torch.zeros(source.shape)
        rows = [self._file.read(stored)[first:last] for stored, first, last in source.parts]
        tensor = rows[0] if len(rows) == 1 else torch.cat(rows)
        return self._to_transformers(name, tensor).contiguous()

    def _source(self, name: str, shape: tuple[int, ...]) -> Source:
        module, _, kind = name.rpartition(".")
        stored = f"{self._names.get_name(module)}.{kind}"
        if stored in self._file.shapes:
            self._require_shape(stored, shape)
            return Source(shape, ((stored, 0, shape[0]),))
        layer, _, leaf = stored.removesuffix(f".{kind}").rpartition(".")
        fused = f"{layer}.attn_qkv.{kind}"
        if leaf in SEPARATE and fused in self._file.shapes:
            sizes = self._head_rows()
            self._require_shape(fused, (sum(sizes), *shape[1:]))
            first = sum(sizes[: SEPARATE.index(leaf)])
            return Source(shape, ((fused, first, first + shape[0]),))
        parts = [f"{layer}.{leaf}.{kind}" for leaf in SEPARATE]
        if leaf == "attn_qkv" and not self._interleaved and set(parts) <= set(self._file.shapes):
            for part, rows in zip(parts, self._head_rows(), strict=True):
                self._require_shape(part, (rows, *shape[1:]))
            return Source(shape, tuple((part, 0, rows) for part, rows in zip(parts, self._head_rows(), strict=True)))
        if any(getattr(self._config, field, False) and pattern.fullmatch(stored) for field, pattern in BIASES.items()):
            return Source(shape, ())  # transformers has all of these biases or none
        raise CheckpointError(
            f"'{self._file.path}' lacks the tensor '{stored}' of a {self._config.model_type} model with "
            f"{self._config.num_hidden_layers} layers. Fetch the model again."
        )

    def _require_shape(self, stored: str, shape: tuple[int, ...]) -> None:
        if self._file.shapes[stored] != shape:
            raise CheckpointError(
                f"'{stored}' in '{self._file.path}' has shape {list(self._file.shapes[stored])}, but its keys require "
                f"{list(shape)}. Fetch the model again."
            )

    def _head_rows(self) -> tuple[int, int, int]:
        """Rows of the query, key and value maps."""
        config = self._config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", config.num_attention_heads) * head_dim
        return config.num_attention_heads * head_dim, keys, keys

    @property
    def _interleaved(self) -> bool:
        """GPT-NeoX has query, key and value of one head side by side; llama.cpp has all queries first."""
        return self._config.model_type == "gpt_neox"

    def _to_transformers(self, name: str, tensor: Tensor) -> Tensor:
        """Undo what llama.cpp's converter does to the values."""
        heads = self._config.num_attention_heads
        if self._architecture.offset_norms and name.endswith("norm.weight"):
            return tensor - 1
        if self._architecture.permuted and (found := re.search(r"\.([qk])_proj\.", name)):
            heads = heads if found[1] == "q" else self._config.num_key_value_heads
            return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
        if self._interleaved and ".query_key_value." in name:
            return tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).reshape(tensor.shape)
        return tensor
