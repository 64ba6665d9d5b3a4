"""Parity of recursive and dense models: the test that an untested family must pass to be converted."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from recursify.checkpoint.dense_families import SUPPORTED_FAMILIES
from recursify.checkpoint.dense_names import DenseNames
from recursify.errors import UnsupportedModelError
from recursify.modeling import (
    FamilyParts,
    LayerLayout,
    LayoutError,
    PerDepth,
    RecursiveConfig,
    RecursiveForCausalLM,
    RelaxedLinear,
    UnsupportedFamily,
)

from .low_rank import full_rank_factors

LOGIT_TOLERANCE = 1e-4
"""Largest difference of float32 logits between two models that compute the same function."""

TRIAL_LAYERS = 4
TRIAL_VOCABULARY = 256
TRIAL_BYTES = 200_000_000
"""Maximum bytes of the dense model of a trial, in float32; its recursive copy is up to 2.5 times as large."""
MLP_DIVISOR = 16
"""Factor by which the MLP of a narrowed trial is divided beyond its hidden size: its width is no structure."""


def require_family_parity(config: PreTrainedConfig) -> None:
    """Check that a small random model of a family keeps its logits when it is made recursive.

    Four layers, narrowed to :data:`TRIAL_BYTES`, are folded into one recursion, and into two with residuals of full
    rank, and compared with the dense model uncached, left-padded and in decoding.

    Raises:
        UnsupportedModelError: The model cannot be built, or its logits differ; the message says where they begin to.
    """
    try:
        reason = _failed_trial(_small_model(config))
    except (UnsupportedFamily, LayoutError) as error:
        reason = str(error)
    except Exception as error:  # a family's own code raises anything on what it does not expect
        reason = f"a small one fails as a recursive model ({type(error).__name__}: {' '.join(str(error).split())})"
    if reason is not None:
        raise UnsupportedModelError(
            f"'{config.model_type}' cannot be made recursive: {reason.removesuffix('.')}. Supported families: "
            f"{', '.join(SUPPORTED_FAMILIES)}."
        )


def _failed_trial(dense: PreTrainedModel) -> str | None:
    """Reason why recursive models do not compute what ``dense`` does; None if they do."""
    for recursions in (1, 2):
        model = fold_exactly(dense, recursions)
        difference = _difference(dense, model)
        if not difference <= LOGIT_TOLERANCE:
            return (
                f"{_first_difference(dense, model)}; with {recursions} recursions its logits differ from the dense "
                f"model's by {difference:.2g}, more than {LOGIT_TOLERANCE:g}"
            )
        del model  # before the next one is built
    return None


def _small_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Random model of ``config`` with few layers and tokens, in float32; norms and biases are random, too."""
    small = _trial_config(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = MODEL_FOR_CAUSAL_LM_MAPPING[type(small)](small).float().eval()
        for parameter in dense.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    return dense


def _trial_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Config of a trial: the widest one of :data:`TRIAL_BYTES` or less, else the narrowest that can be built."""
    shallow = _with_few_layers(config)
    narrowest = shallow
    for divisor in _divisors(config):
        small = _narrowed(shallow, divisor)
        try:
            num_bytes = _float32_bytes(small)
        except Exception:  # a family's own code raises anything on widths that it does not support
            continue
        if num_bytes <= TRIAL_BYTES:
            return small
        narrowest = small
    return narrowest


def _with_few_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """Copy of ``config`` with the layers of :func:`_trial_positions` and a small vocabulary."""
    small = copy.deepcopy(config)
    positions = _trial_positions(config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(small, name, [value[position] for position in positions])
    small.num_hidden_layers = len(positions)
    small.vocab_size = min(TRIAL_VOCABULARY, config.vocab_size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(small, name, 0)
    return small


def _divisors(config: PreTrainedConfig) -> list[int]:
    """Numbers to divide widths by, ascending from 1, that keep the size of a head and the heads per key-value head.

    A single key-value head remains one.
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    common = math.gcd(heads, config.hidden_size, heads if kv_heads == 1 else kv_heads)
    return [divisor for divisor in range(1, common + 1) if common % divisor == 0]


def _narrowed(config: PreTrainedConfig, divisor: int) -> PreTrainedConfig:
    """Copy of ``config`` with heads and widths divided by ``divisor``."""
    if divisor == 1:
        return config
    small = copy.deepcopy(config)
    widths = {"num_attention_heads": divisor, "num_key_value_heads": divisor, "hidden_size": divisor}
    for name, factor in {**widths, "intermediate_size": divisor * MLP_DIVISOR}.items():
        if isinstance(value := getattr(small, name, None), int):
            setattr(small, name, max(1, value // factor))
    return small


def _float32_bytes(config: PreTrainedConfig) -> int:
    """Bytes of the parameters of a model of ``config`` in float32."""
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    return sum(4 * parameter.numel() for parameter in model.parameters())


def fold_exactly(dense: PreTrainedModel, num_recursions: int) -> RecursiveForCausalLM:
    """Recursive model that computes the same as ``dense``: shared weights zero, residuals of full rank.

    It is larger than the dense model.
    """
    layout = LayerLayout.fold(dense.config.num_hidden_layers, num_recursions, "cycle")
    config = RecursiveConfig.from_dense(dense.config, layout, lora_rank=0 if num_recursions == 1 else 2**20)
    model = RecursiveForCausalLM(config).to(dense.dtype).eval()
    names, state = DenseNames(config), dict(dense.named_parameters())
    with torch.no_grad():
        for name, dense_name in names.unshared.items():
            model.get_parameter(name).copy_(state[dense_name])
        for index, layer in enumerate(model.model.block):
            for depth, position in enumerate(layout.positions(index)):
                for path, module in layer.stored_modules():
                    _copy_depth(module, depth, f"{names.stem}.{position}.{path}", state)
    return model


def _copy_depth(module: RelaxedLinear | PerDepth, depth: int, name: str, state: dict[str, Tensor]) -> None:
    """Copy the dense weights called ``name`` into ``module`` at ``depth``."""
    if isinstance(module, PerDepth):
        for parameter_name, parameter in module.copies[depth].named_parameters():
            parameter.copy_(state[f"{name}.{parameter_name}"])
        return
    weight = state[f"{name}.weight"]
    if module.lora_a is None or module.lora_b is None:
        module.linear.weight.copy_(weight)
    else:
        module.linear.weight.zero_()
        module.lora_b[depth], module.lora_a[depth] = full_rank_factors(weight)
    if module.bias is not None:
        module.bias[depth] = state[f"{name}.bias"]


def _trial_positions(config: PreTrainedConfig) -> list[int]:
    """Positions of the layers that are tried: the first of each attention type, and the first ones."""
    kinds = getattr(config, "layer_types", None) or []
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    others = [position for position in range(config.num_hidden_layers) if position not in firsts]
    return sorted([*firsts, *others][: max(TRIAL_LAYERS, len(firsts))])


@torch.inference_mode()
def _difference(dense: PreTrainedModel, model: PreTrainedModel) -> float:
    """Largest difference of logits: uncached, left-padded, and over cached decoding steps."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, dense.config.vocab_size, (2, 13), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    logits = []
    for run in (dense, model):
        cache = run(ids[:, :9], use_cache=True).past_key_values
        steps = [run(ids[:, step : step + 1], past_key_values=cache).logits for step in range(9, 13)]
        padded = run(ids, attention_mask=mask).logits[mask.bool()]
        logits.append(torch.cat([part.flatten() for part in (run(ids).logits, padded, *steps)]))
    return float((logits[0] - logits[1]).abs().max())


STAGES = (
    "it changes the embeddings before its first layer, by a scale or a norm",
    "its layers take more than hidden states, mask and RoPE",
    "it changes the hidden states between its last layer and the LM head",
    "it changes the logits behind the LM head, by a scale or a cap",
)
"""Reasons for a difference, by the first tensor that differs: input and output of the layers, input of the head,
logits."""


@torch.inference_mode()
def _first_difference(dense: PreTrainedModel, model: RecursiveForCausalLM) -> str:
    """The entry of :data:`STAGES` where the two models part, which have the same weights."""
    parts = FamilyParts(dense.base_model, dense.config.num_hidden_layers)
    modules = (
        (parts.layers[0], parts.norm, dense.get_output_embeddings()),
        (model.model.block[0], model.model.norm, model.lm_head),
    )
    ids = torch.arange(2, 11)[None]
    seen = [_inputs_of(run, watched, ids) for run, watched in zip((dense, model), modules, strict=True)]
    for stage, one, other in zip(STAGES, *seen, strict=True):
        if not (one - other).abs().max() <= LOGIT_TOLERANCE:
            return stage
    return "it computes something else in batches, with padding or with a cache"


def _inputs_of(model: PreTrainedModel, modules: Iterable[nn.Module], ids: Tensor) -> list[Tensor]:
    """First inputs of the first module, and last ones of the others, in a run on ``ids [1, T]``; and the logits."""
    inputs: dict[int, list[Tensor]] = {}
    hooks = []
    for index, module in enumerate(modules):
        record = inputs.setdefault(index, [])

        def keep(_: nn.Module, arguments: Any, named: Any, record: list[Tensor] = record) -> None:
            record.append(arguments[0] if arguments else named["hidden_states"])

        hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        logits = model(ids).logits
    finally:
        for hook in hooks:
            hook.remove()
    return [record[0 if index == 0 else -1] for index, record in inputs.items()] + [logits]
