"""Parity of recursive and dense models: the test that an untested family must pass to be converted."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from recursify.checkpoint.dense_names import DenseNames
from recursify.errors import UnsupportedModelError
from recursify.modeling import (
    LayerLayout,
    LayoutError,
    PerDepth,
    RecursiveConfig,
    RecursiveForCausalLM,
    RelaxedLinear,
    UnsupportedFamily,
)

from .low_rank import full_rank_factors
from .plan import SUPPORTED_FAMILIES

LOGIT_TOLERANCE = 1e-4
"""Largest difference of float32 logits between two models that compute the same function."""

TRIAL_LAYERS = 4
TRIAL_VOCABULARY = 256


def require_family_parity(config: PreTrainedConfig) -> None:
    """Check that a small random model of a family keeps its logits when it is made recursive.

    Four layers of the model's own width are folded into one recursion, and into two with residuals of full rank, and
    compared with the dense model uncached, left-padded and in decoding.

    Raises:
        UnsupportedModelError: The model cannot be built, or its logits differ.
    """
    small = copy.deepcopy(config)
    small.num_hidden_layers = min(TRIAL_LAYERS, config.num_hidden_layers)
    small.vocab_size = min(TRIAL_VOCABULARY, config.vocab_size)
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if isinstance(getattr(small, name, None), list):
            setattr(small, name, getattr(small, name)[: small.num_hidden_layers])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, None)
    known = f"Supported families: {', '.join(SUPPORTED_FAMILIES)}."
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            dense = MODEL_FOR_CAUSAL_LM_MAPPING[type(small)](small).float().eval()
        for recursions in (1, 2):
            difference = _difference(dense, fold_exactly(dense, recursions))
            if not difference <= LOGIT_TOLERANCE:
                raise UnsupportedModelError(
                    f"Family '{config.model_type}' is not supported: with {recursions} recursions its logits differ "
                    f"from the dense model's by {difference:.2g}, more than {LOGIT_TOLERANCE:g}. It computes something "
                    f"around its layers that recursion does not reproduce. {known}"
                )
    except (UnsupportedFamily, LayoutError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise UnsupportedModelError(f"Family '{config.model_type}' is not supported: {error} {known}") from error


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
