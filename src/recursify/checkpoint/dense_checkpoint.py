"""Lazy, checked reading of dense checkpoints: a folder of safetensors, a ``.gguf`` file, or a Hub id.

A folder is read one tensor at a time from memory-mapped shards; opening it reads headers only. A ``.gguf`` is
dequantized by transformers and therefore in memory as a whole.
"""

from __future__ import annotations

import copy
import json
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from recursify.errors import CheckpointError, UnsupportedModelError

from .origin import Origin, origin_of_folder, origin_of_gguf
from .shards import TensorInfo, read_headers, shard_files
from .sources import AUXILIARY_FILES, EMBEDDED_HUB_IDS, locate

RENAMED = {"lm_head.weight": "embed_out.weight"}
"""Parameter names that transformers changed since checkpoints were written: current name to name on disk."""


class DenseCheckpoint(ABC):
    """A dense causal language model on disk, read by parameter name.

    Attributes:
        source: Model as the user named it.
        location: Folder or file on disk.
        config: Config of the dense family.
        parameters: Shape and dtype of every parameter by its name in transformers; without a head that is tied to the
            embedding.
    """

    source: str
    location: Path
    config: PreTrainedConfig
    parameters: dict[str, TensorInfo]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Read the tensor ``name`` in the dtype on disk; the caller may modify it.

        Raises:
            CheckpointError: It has NaN or Inf values, or cannot be read.
        """

    @abstractmethod
    def origin(self) -> Origin:
        """Origin and licence of the model, as far as its files state them."""

    @abstractmethod
    def save_auxiliary_files(self, folder: Path) -> None:
        """Write tokenizer, chat template, generation config and licences into ``folder``."""

    @property
    def embedding_name(self) -> str:
        """Parameter name of the token embedding."""
        return next(name for name in self.parameters if name.endswith(("embed_tokens.weight", "embed_in.weight")))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point dtype of most weights, by bytes."""
        sizes: Counter[torch.dtype] = Counter()
        for info in self.parameters.values():
            sizes[info.dtype] += info.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def load_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Load the whole dense model in eval mode; ``dtype`` defaults to the one on disk."""
        with torch.device("meta"):
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)](self.config)
        dtype = dtype or self.dtype
        model.to(dtype)
        model.to_empty(device="cpu")
        state = {name: self.read(name).to(dtype) for name in self.parameters}
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        for parameter in model.parameters():
            parameter._is_hf_initialized = True  # keeps _init_weights from overwriting it
        for module in model.modules():  # buffers are computed, not stored
            if any(True for _ in module.buffers(recurse=False)):
                model._init_weights(module)
        return model.eval()


def open_checkpoint(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> DenseCheckpoint:
    """Open a dense checkpoint and check its config and headers.

    Args:
        source: Folder, ``.gguf`` file, embedded model or Hub id.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Permission to run code from the folder.

    Raises:
        CheckpointError: Missing or damaged files, missing tensors, wrong shapes, a pickle, or a recursive model.
        UnsupportedModelError: Not a causal language model that transformers supports.
    """
    source = str(source)
    path = locate(source, revision=revision)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"'{path}' is a file, but not a .gguf. Give the model's folder instead.")
        return GgufCheckpoint(source, path)
    return SafetensorsFolder(source, path, trust_remote_code=trust_remote_code)


class SafetensorsFolder(DenseCheckpoint):
    """A Hugging Face folder with one or more safetensors shards."""

    def __init__(self, source: str, folder: Path, *, trust_remote_code: bool = False):
        self.source = source
        self.location = folder
        self.config = _read_config(folder, trust_remote_code)
        shard_of = shard_files(folder)
        stored = read_headers(folder, shard_of)
        self._stored_names, self.parameters = _match(self.config, stored, folder)
        self._shard_of = {name: shard_of.get(stored_name) for name, stored_name in self._stored_names.items()}

    def read(self, name: str) -> Tensor:
        shard = self.location / str(self._shard_of[name])
        # One handle per tensor: its memory map is released with it, so unused pages do not stay resident.
        try:
            with safe_open(shard, framework="pt") as file:
                tensor = file.get_tensor(self._stored_names[name])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"'{name}' cannot be read from {shard}: {error}. Fetch the shard again.") from error
        return _refuse_non_finite(tensor, name, str(shard))

    def origin(self) -> Origin:
        return origin_of_folder(self.source, self.location)

    def save_auxiliary_files(self, folder: Path) -> None:
        copy_auxiliary_files(self.location, folder)


def copy_auxiliary_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation config and licences from one model folder to another."""
    for pattern in AUXILIARY_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_dir():
                shutil.copytree(file, target / file.name, dirs_exist_ok=True)
            else:
                shutil.copy2(file, target / file.name)


class GgufCheckpoint(DenseCheckpoint):
    """A ``.gguf`` file, dequantized to float32 by transformers."""

    def __init__(self, source: str, file: Path):
        self.source = source
        self.location = file
        try:
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        except Exception as error:  # the gguf reader raises errors of any type
            raise CheckpointError(
                f"'{file}' cannot be read as a GGUF language model: {error}. Use a family that transformers' GGUF "
                f"documentation lists (llama, qwen2, gemma2 and others)."
            ) from error
        self.config = _plain_config(model.config)
        self._model = model
        self.parameters = {name: TensorInfo(tuple(p.shape), p.dtype) for name, p in model.named_parameters()}

    def read(self, name: str) -> Tensor:
        # A copy, since the caller may modify it.
        return _refuse_non_finite(self._model.get_parameter(name).detach().clone(), name, str(self.location))

    def origin(self) -> Origin:
        return origin_of_gguf(self.location, EMBEDDED_HUB_IDS.get(self.source))

    def save_auxiliary_files(self, folder: Path) -> None:
        load_tokenizer(self).save_pretrained(folder)
        if self._model.generation_config is not None:
            self._model.generation_config.save_pretrained(folder)


def load_tokenizer(checkpoint: DenseCheckpoint):
    """Load the dense model's tokenizer.

    Raises:
        CheckpointError: It has none that loads.
    """
    path = checkpoint.location
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"The tokenizer of '{checkpoint.source}' does not load: {error}") from error


def _plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Restore the original config of a GGUF: without quantization, and with decimal epsilons.

    GGUF stores floats in 32 bits, so 1e-5 is read as 9.999999747378752e-06; the shortest decimal of the 32-bit value
    is the original one.
    """
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    for key, value in vars(config).items():
        if isinstance(value, float):
            setattr(config, key, float(str(np.float32(value))))
    return config


def _read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(f"'{folder}' has no config.json. Give the folder of a Hugging Face model.")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"'{file}' is not valid JSON: {error}.") from error
    if fields.get("model_type") == "recursive":
        raise CheckpointError(
            f"'{folder}' is already a recursive model. Export it first (recursify export {folder} -o DENSE --format "
            f"dense) and convert the export."
        )
    if "auto_map" in fields and not trust_remote_code:
        raise UnsupportedModelError(
            f"'{folder}' needs its own Python code ({', '.join(sorted(fields['auto_map']))} in auto_map). Read that "
            f"code; if you trust it, pass --trust-remote-code."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except StrictDataclassError as error:
        raise CheckpointError(
            f"'{file}' does not load: {' '.join(str(error).split())}. Correct the field, or fetch the model again."
        ) from error
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModelError(
            f"transformers does not support the model in '{folder}' (model_type '{fields.get('model_type')}'): "
            f"{str(error).splitlines()[0]}"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"'{fields.get('model_type')}' is not a causal language model in transformers. Only those can be made "
            f"recursive."
        )
    return config


def _match(
    config: PreTrainedConfig, stored: dict[str, TensorInfo | str], folder: Path
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Name on disk, and shape and dtype, of the family's parameters."""
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    names: dict[str, str] = {}
    infos: dict[str, TensorInfo] = {}
    for name, parameter in model.named_parameters():  # a tied head is listed once, under the embedding
        candidates = (name, RENAMED.get(name, name), name.removeprefix(f"{model.base_model_prefix}."))
        stored_name = next((candidate for candidate in candidates if candidate in stored), None)
        if stored_name is None:
            raise CheckpointError(
                f"'{folder}' lacks the tensor '{name}' of a {config.model_type} model with {config.num_hidden_layers} "
                f"layers. The folder is incomplete, or config.json belongs to another model: fetch the model again."
            )
        info = stored[stored_name]
        if isinstance(info, str):
            raise CheckpointError(
                f"'{stored_name}' is stored as {info}, which is not floating-point. Convert the unquantized checkpoint."
            )
        if info.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"'{stored_name}' has shape {list(info.shape)}, but config.json requires {list(parameter.shape)}. The "
                f"weights and the config belong to different models: fetch the model again."
            )
        names[name], infos[name] = stored_name, info
    return names, infos


def _refuse_non_finite(tensor: Tensor, name: str, where: str) -> Tensor:
    # One pass without a copy: the extremes are NaN or Inf if and only if an element is. (float8 has no aminmax.)
    checked = tensor if tensor.dtype.itemsize > 1 else tensor.float()
    if tensor.numel() and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(checked)):
        bad = int((~torch.isfinite(checked)).sum())
        raise CheckpointError(
            f"'{name}' in {where} has {bad} NaN or Inf values, and every layer tied to it would inherit them. Fetch "
            f"the model again, or convert another checkpoint."
        )
    return tensor
