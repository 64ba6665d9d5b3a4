"""A ``.gguf`` file as a dense checkpoint: config, weights and tokenizer from that file alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint, refuse_non_finite
from recursify.checkpoint.dense_families import require_convertible
from recursify.checkpoint.origin import Origin
from recursify.checkpoint.shards import TensorInfo
from recursify.checkpoint.sources import EMBEDDED_HUB_IDS

from .architectures import architecture_of
from .config import read_config
from .file import GgufFile
from .generation import read_generation_config
from .tokenizer import build_tokenizer
from .vocabulary import NO_TOKENIZER, require_tokenizer
from .weights import GgufWeights

ORIGIN_KEYS = ("license", "license.name", "license.link", "languages")


class GgufCheckpoint(DenseCheckpoint):
    """A ``.gguf`` file, dequantized to float32 one tensor at a time.

    Args:
        source: Model as the user named it.
        path: The file.

    Raises:
        CheckpointError: The file is damaged or incomplete, or the package ``gguf`` is missing.
        UnsupportedModelError: It has a key, a tensor or a tokenizer that is not known.
    """

    def __init__(self, source: str, path: Path):
        self.source = source
        self.location = path
        self._file = GgufFile(path)
        architecture = architecture_of(self._file)
        self.config = read_config(self._file, architecture)
        self._weights = GgufWeights(self._file, architecture, require_convertible(self.config))
        self.parameters = {
            name: TensorInfo(source.shape, torch.float32) for name, source in self._weights.sources.items()
        }
        if self.has_tokenizer:
            require_tokenizer(self._file)

    @property
    def has_tokenizer(self) -> bool:
        return self._file.get("tokenizer.ggml.model") not in NO_TOKENIZER

    def read(self, name: str) -> Tensor:
        return refuse_non_finite(self._weights.read(name), name, str(self.location))

    def load_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        model = super().load_model(dtype)
        model.generation_config = read_generation_config(self._file)
        return model

    def origin(self) -> Origin:
        stated = {key.replace(".", "_"): self._file.get(f"general.{key}") for key in ORIGIN_KEYS}
        stated = {key: value for key, value in stated.items() if value is not None}
        return Origin.from_mapping({**stated, "hub_id": EMBEDDED_HUB_IDS.get(self.source)})

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer, with special tokens and chat template.

        Raises:
            CheckpointError: Its vocabulary is damaged.
        """
        return build_tokenizer(self._file)

    def save_auxiliary_files(self, folder: Path) -> None:
        if self.has_tokenizer:
            self.build_tokenizer().save_pretrained(folder)
        read_generation_config(self._file).save_pretrained(folder)
