"""Lazy, checked reading of dense checkpoints: a folder of safetensors, a ``.gguf`` file, or a Hub id.

One tensor is read at a time from memory-mapped files; opening them reads headers only.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    FineGrainedFP8Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from recursify.errors import CheckpointError, UnsupportedModelError

from .dense_families import require_convertible
from .dense_tensors import match_tensors
from .generation_defaults import read_generation_config
from .origin import Origin, origin_of_folder
from .quantization import dequantize_fp8, dequantized_headers, fp8_scales, quant_method, require_unquantized
from .shards import TensorInfo, read_headers, shard_files
from .sources import AUXILIARY_FILES, locate


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
    @abstractmethod
    def has_tokenizer(self) -> bool:
        """A tokenizer comes with the weights."""

    @abstractmethod
    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer; :func:`load_tokenizer` says what is wrong if it does not."""

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
        model = self._build_skeleton(dtype or self.dtype)
        return self._fill(model, self.parameters)

    def stream_model(self) -> PreTrainedModel:
        """Dense model to run a few times, in eval mode: each layer is read when it runs, and released after that."""
        model = self._build_skeleton(self.dtype)
        body = model.base_model
        layers, stem = body._modules.pop("layers"), f"{model.base_model_prefix}.layers"
        self._fill(model, [name for name in self.parameters if not name.startswith(f"{stem}.")])
        body.layers = layers

        def load(path: str, layer: nn.Module, _: Any) -> None:
            state = {name: self.read(f"{path}.{name}").to(self.dtype) for name, _ in layer.named_parameters()}
            layer.load_state_dict(state, assign=True)

        def release(layer: nn.Module, *_: Any) -> None:
            layer.to("meta")

        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(load, f"{stem}.{index}"))
            layer.register_forward_hook(release)
        return model.eval()

    def _build_skeleton(self, dtype: torch.dtype) -> PreTrainedModel:
        """Dense model on the meta device."""
        with torch.device("meta"):
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)](self.config).to(dtype)

    def _fill(self, model: PreTrainedModel, names: Iterable[str]) -> PreTrainedModel:
        """Read the parameters called ``names`` into ``model``, which has no others, and compute its buffers."""
        dtype = model.dtype
        model.to_empty(device="cpu")
        model.load_state_dict({name: self.read(name).to(dtype) for name in names}, strict=False, assign=True)
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
    path = locate(source, revision=revision, code=trust_remote_code)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"'{path}' is a file, but not a .gguf. Give the model's folder instead.")
        from .gguf.checkpoint import GgufCheckpoint  # a subclass of DenseCheckpoint, so it imports this module

        return GgufCheckpoint(source, path)
    return SafetensorsFolder(source, path, trust_remote_code=trust_remote_code)


class SafetensorsFolder(DenseCheckpoint):
    """A Hugging Face folder with one or more safetensors shards."""

    def __init__(self, source: str, folder: Path, *, trust_remote_code: bool = False):
        self.source = source
        self.location = folder
        fields = read_fields(folder)
        self.config = _read_config(folder, fields, trust_remote_code)
        skeleton = require_convertible(self.config)
        read_generation_config(folder)  # is copied, and read when the result is checked
        self._shard_of = shard_files(folder)
        stored = read_headers(folder, self._shard_of)
        self._scales = fp8_scales(fields, stored)
        if self._scales:
            stored = dequantized_headers(stored, self._scales, self.config.dtype or torch.bfloat16)
        else:
            require_unquantized(fields, stored, folder)
        matched = match_tensors(skeleton, stored, folder)
        self._stored_names, self.parameters = matched.stored_names, matched.parameters
        self._resolve_ties(matched.tied)

    def _resolve_ties(self, tied: dict[str, str]) -> None:
        """Tie as transformers does: what is on disk under both names, with unlike values, is not tied.

        ``tied`` maps a parameter to the one that the config ties it to.
        """
        for name, target in tied.items():
            if name not in self.parameters:
                continue
            if target not in self.parameters:  # on disk under the other name alone
                self.parameters[target], self._stored_names[target] = self.parameters[name], self._stored_names[name]
            elif not torch.equal(self.read(name), self.read(target)):
                self.config.tie_word_embeddings = False
                continue
            del self.parameters[name], self._stored_names[name]

    def load_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        # By transformers alone: it is the control of what this class reads.
        return load_dense_folder(self.location, dtype or self.dtype)

    def stream_model(self) -> PreTrainedModel:
        return self.load_model()  # which maps its files into memory, where the dtype is theirs

    def read(self, name: str) -> Tensor:
        stored_name = self._stored_names[name]
        tensor = self._read_stored(name, stored_name)
        if stored_name in self._scales:
            scale = self._read_stored(name, self._scales[stored_name])
            tensor = dequantize_fp8(tensor, scale).to(self.parameters[name].dtype)
        return refuse_non_finite(tensor, name, str(self.location / self._shard_of[stored_name]))

    def _read_stored(self, name: str, stored_name: str) -> Tensor:
        """Read the tensor of parameter ``name`` that is called ``stored_name`` on disk."""
        shard = self.location / self._shard_of[stored_name]
        # One handle per tensor: its memory map is released with it, so unused pages do not stay resident.
        try:
            with safe_open(shard, framework="pt") as file:
                return file.get_tensor(stored_name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"'{name}' cannot be read from {shard}: {error}. Fetch the shard again.") from error

    def origin(self) -> Origin:
        return origin_of_folder(self.source, self.location)

    @property
    def has_tokenizer(self) -> bool:
        return any(self.location.glob("tokenizer*"))

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.location)

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


def load_tokenizer(checkpoint: DenseCheckpoint) -> PreTrainedTokenizerBase:
    """Load the dense model's tokenizer.

    Raises:
        CheckpointError: It has none that loads.
    """
    try:
        return checkpoint.build_tokenizer()
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"The tokenizer of '{checkpoint.source}' does not load: {error}") from error


def read_fields(folder: Path) -> dict[str, Any]:
    """Contents of a dense folder's ``config.json``.

    Raises:
        CheckpointError: There is none, it is damaged, or it belongs to a recursive model or to an adapter.
    """
    file = folder / "config.json"
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"'{folder}' has an adapter of peft (adapter_config.json). Merge it into its base model first "
            f"(PeftModel.merge_and_unload), save that, and give its folder."
        )
    if not file.exists():
        raise CheckpointError(f"'{folder}' has no config.json. Give the folder of a Hugging Face model.")
    try:
        fields = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"'{file}' is not valid JSON: {error}.") from error
    if fields.get("model_type") == "recursive":
        raise CheckpointError(
            f"'{folder}' is already a recursive model. Export it first (recursify export {folder} -o DENSE --format "
            f"dense) and convert the export."
        )
    return fields


def _runs_own_code(folder: Path, fields: dict[str, Any], trust_remote_code: bool) -> bool:
    """Tell whether a folder's own code is to run; transformers' code is preferred where it has the family.

    Raises:
        UnsupportedModelError: The model needs its own code, which is not trusted.
    """
    if "auto_map" not in fields or fields.get("model_type") in CONFIG_MAPPING:
        return False
    if not trust_remote_code:
        raise UnsupportedModelError(
            f"'{folder}' needs its own Python code ({', '.join(sorted(fields['auto_map']))} in auto_map). Read that "
            f"code; if you trust it, pass --trust-remote-code."
        )
    return True


def _read_config(folder: Path, fields: dict[str, Any], trust_remote_code: bool) -> PreTrainedConfig:
    runs_own_code = _runs_own_code(folder, fields, trust_remote_code)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=runs_own_code)
    except StrictDataclassError as error:
        raise CheckpointError(
            f"'{folder / 'config.json'}' does not load: {' '.join(str(error).split())}. Correct the field, or fetch "
            f"the model again."
        ) from error
    except Exception as error:  # a config's constructor raises anything on values that it does not expect
        raise UnsupportedModelError(
            f"transformers does not support the model in '{folder}' (model_type '{fields.get('model_type')}'): "
            f"{str(error).partition(chr(10))[0]}"
        ) from error


def load_dense_folder(folder: Path, dtype: torch.dtype | str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a dense model of any family by transformers, in eval mode.

    Args:
        folder: Folder of the model.
        dtype: Dtype of the weights; ``"auto"`` as transformers chooses it.
        trust_remote_code: Permission to run code from the folder, for a family that transformers does not have.

    Raises:
        CheckpointError: It does not load, or lacks tensors.
        UnsupportedModelError: It needs its own code, which is not trusted.
    """
    fields = read_fields(folder)
    runs_own_code = _runs_own_code(folder, fields, trust_remote_code)
    shard_files(folder)
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if quant_method(fields) == "fp8" else {}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=runs_own_code, output_loading_info=True, **options
        )
    except Exception as error:  # configs, quantizers and remote code raise anything
        raise CheckpointError(f"'{folder}' does not load: {' '.join(str(error).split())}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"'{folder}' lacks {len(missing)} of the model's tensors, first '{missing[0]}', which transformers would "
            f"fill with random numbers. Fetch the model again."
        )
    return model.eval()


def refuse_non_finite(tensor: Tensor, name: str, where: str) -> Tensor:
    """``tensor`` itself, ``name`` in the file ``where``; a CheckpointError if it has NaN or Inf values."""
    # One pass without a copy: the extremes are NaN or Inf if and only if an element is.
    if tensor.numel() and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"'{name}' in {where} has {bad} NaN or Inf values, and every layer tied to it would inherit them. Fetch "
            f"the model again, or convert another checkpoint."
        )
    return tensor
