"""Dense families: which can be made recursive, and the reason why another cannot, before a tensor is read.

The reason is found in the config, and in the family's model built on the meta device: its modules do not depend on the
weights. What only computing shows (a scale between layers and logits) is left to the parity check of unlisted families
(``convert/parity.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from recursify.errors import UnsupportedModelError
from recursify.modeling import FamilyParts, RecursiveConfig, UnsupportedFamily, weight_owners

SUPPORTED_FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "smollm3",
    "phi3",
    "gpt_neox",
)
"""``model_type`` of the families whose parity is tested in this project."""

LOOPED_FAMILIES = ("dory", "hrm_text", "inkling2_loop_text")
"""Families that run their layers several times already."""

RECURRENT = re.compile(
    r"Mamba|SSM|Rwkv|LSTM|RgLru|Recurrent|DeltaNet|DeltaRule|DeltaAttention|LinearAttention|LightningAttention|ShortConv"
)
"""Class names of modules that carry a state from token to token beside keys and values."""

POSITIONS = re.compile(r"^(wpe|embed_positions|position_embeddings?|pos_embed\w*)$")
"""Names of learned or tabulated position embeddings."""


def require_convertible(config: PreTrainedConfig) -> PreTrainedModel:
    """Check that models of this config can be made recursive, as far as their structure tells.

    Returns:
        The family's model on the meta device.

    Raises:
        UnsupportedModelError: They cannot; the message names the family and the first reason.
    """
    reason = _refused_by_config(config)
    if reason is None:
        try:
            skeleton = _skeleton(config)
        except Exception as error:  # a family's constructor raises anything on values that it does not expect
            reason = f"transformers cannot build it from this config ({_one_line(error)})"
        else:
            reason = next((found for check in STRUCTURE for found in [check(config, skeleton)] if found), None)
            if reason is None:
                return skeleton
    raise UnsupportedModelError(
        f"'{config.model_type}' cannot be made recursive: {reason}. Supported families: "
        f"{', '.join(SUPPORTED_FAMILIES)}."
    )


def _skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# --- Reasons in the config ------------------------------------------------------------------------------------------


def _refused_by_config(config: PreTrainedConfig) -> str | None:
    """Reason in the config alone; None if there is none."""
    if config.model_type in LOOPED_FAMILIES:
        return "it runs its layers several times already"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model, and only decoders are converted"
    try:
        text = config.get_text_config(decoder=True)
    except ValueError:
        return "it is made of several models"
    if text is not config:
        return _refused_wrapper(text)
    # A family of a folder's own code is in the second mapping once its model has been loaded.
    if config.model_type not in CONFIG_MAPPING or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "it is not a causal language model in transformers"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "its tokens attend to later ones (use_bidirectional_attention), as in embedding models"
    if getattr(config, "is_causal", True) is False:
        return "its tokens attend to later ones (is_causal is false), as in embedding models"
    return None


def _refused_wrapper(text: PreTrainedConfig) -> str:
    """Reason for a model that contains a language model of config ``text`` beside other parts."""
    reason = f"it is a language model of family '{text.model_type}' inside another model (multimodal)"
    try:
        require_convertible(text)
    except UnsupportedModelError as error:
        inner = str(error).partition(" cannot be made recursive: ")[2].partition(". Supported families: ")[0]
        return f"{reason}, and that family cannot be converted either: {inner}"
    return f"{reason}. Save the language model as a folder of its own, and convert that (docs/howto/convert.md)"


# --- Reasons in the structure ---------------------------------------------------------------------------------------


def _experts(config: PreTrainedConfig, skeleton: PreTrainedModel) -> str | None:
    """Mixture of experts."""
    for path, module in skeleton.named_modules():
        if type(module).__name__.endswith("Experts") or path.rpartition(".")[2] == "experts":
            return f"its layers are mixtures of experts ('{path}'), which cannot be shared yet"
    return None


def _encoder(config: PreTrainedConfig, skeleton: PreTrainedModel) -> str | None:
    """Attention to later tokens."""
    if getattr(config, "is_decoder", True) is False and hasattr(skeleton.base_model, "encoder"):
        return "it is an encoder, whose tokens attend to later ones"
    return None


def _recurrent(config: PreTrainedConfig, skeleton: PreTrainedModel) -> str | None:
    """State-space layers, linear attention and convolutions over tokens."""
    family = type(skeleton).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    for path, module in _in_layers(skeleton):
        kind = type(module).__name__
        # Without the family's name: Mamba2RMSNorm is a norm.
        if isinstance(module, nn.Conv1d) or RECURRENT.search(kind.removeprefix(family)):
            return (
                f"'{path}' ({kind}) carries a state from token to token (state-space layers, linear attention, "
                f"convolutions), and only attention is supported"
            )
    return None


def _in_layers(skeleton: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the decoder layers with their paths in the base model."""
    for name, child in skeleton.base_model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from child.named_modules(prefix=name)


def _shared_keys(config: PreTrainedConfig, skeleton: PreTrainedModel) -> str | None:
    """Keys and values of one layer read by others."""
    shared = getattr(config, "num_kv_shared_layers", None)
    if isinstance(shared, int) and shared > 0:
        return f"{shared} of its layers read the keys and values of others (num_kv_shared_layers)"
    return None


def _positions(config: PreTrainedConfig, skeleton: PreTrainedModel) -> str | None:
    """Positions that are added to embeddings, or to attention scores."""
    conv1d = next((path for path, module in skeleton.named_modules() if isinstance(module, Conv1D)), None)
    reasons = [] if conv1d is None else [f"its weights are Conv1D ('{conv1d}'), and shared layers need nn.Linear"]
    for path, module in skeleton.named_modules():
        if POSITIONS.match(path.rpartition(".")[2]):
            learned = "learned" if any(True for _ in module.parameters()) else "tabulated"
            reasons.append(f"its positions are {learned} ('{path}'), and only RoPE is supported")
            break
    return "; ".join(reasons) or None


def _parts(config: PreTrainedConfig, skeleton: PreTrainedModel) -> str | None:
    """Parts beyond embedding, RoPE, decoder layers and final norm, and weights in layers that cannot be shared."""
    try:
        parts = FamilyParts(skeleton.base_model, getattr(config, "num_hidden_layers", -1))
        for layer in _unlike(parts.layers):
            list(weight_owners(layer))
    except UnsupportedFamily as error:
        reason = str(error).removesuffix(".")
        return reason[0].lower() + reason[1:]
    return None


def _unlike(layers: list[nn.Module]) -> Iterator[nn.Module]:
    """The first layer of each kind."""
    seen = set()
    for layer in layers:
        modules = tuple((path, type(module)) for path, module in layer.named_modules())
        kind = (modules, tuple(name for name, _ in layer.named_parameters()))
        if kind not in seen:
            seen.add(kind)
            yield layer


def _clash(config: PreTrainedConfig, skeleton: PreTrainedModel) -> str | None:
    """Fields of the config that recursive models have too."""
    field = RecursiveConfig.clash_with(config)
    return field and f"its config has a field '{field}', which means something else in a recursive model's config"


STRUCTURE: tuple[Callable[[PreTrainedConfig, PreTrainedModel], str | None], ...] = (
    _encoder,
    _experts,
    _recurrent,
    _shared_keys,
    _positions,
    _parts,
    _clash,
)
"""Checks of the structure in the order of their reasons."""
