"""What is checked before an engine runs, and before it takes a request."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch

from recursify.errors import EngineError, UnsupportedModelError
from recursify.kernels.dispatch import Implementation, implementation_on, why_not_triton
from recursify.modeling import ExitSettings
from recursify.modeling.recursive_decoding import check_depths
from recursify.modeling.recursive_policies import KV_MODES as EXIT_KV
from recursify.modeling.recursive_routing import ROUTED_KV

from .layers.batch import TokenSpan
from .layers.decoder import DecoderAdapter
from .layers.model_runner import ModelRunner
from .request import Request, SamplingParams

logger = logging.getLogger(__name__)

KV_MODES = (*EXIT_KV, *ROUTED_KV)
"""Where keys and values of the depths that a token skips come from: of models with exits the first three
(``recursive_policies.KV_MODES``), of routed models the last two (``recursive_routing.ROUTED_KV``)."""

PARITY = {torch.float64: 1e-2, torch.float32: 1e-2}
"""By how much of the largest logit an engine's may differ from the model's, 0.1 in other dtypes: sums are in another
order (measured: 1.3e-3 on a random Gemma 2 of eight layers), and a part that is missing is a difference of order 1."""


def choose_kv(decoder: DecoderAdapter, kv: str | None, *, force: bool) -> str:
    """The mode of keys and values: ``kv``, else what the model was trained for.

    Raises:
        EngineError: An unknown one, or one that the model was not trained for.
    """
    if kv is not None and kv not in KV_MODES:
        raise EngineError(f"Unknown kv '{kv}'. Use one of: {', '.join(KV_MODES)}.")
    trained = decoder.config.router_kv if decoder.is_routed else getattr(decoder.config, "exit_kv", "deferred")
    if kv is None or kv == trained:
        return trained
    if decoder.is_routed or kv in ROUTED_KV:
        raise EngineError(f"kv '{kv}' is not for this model, whose own is '{trained}'. Leave kv out.")
    if not force:
        raise EngineError(
            f"The model was trained with '{trained}' keys and values, and '{kv}' makes others where tokens leave "
            f"early. Leave kv out, or take what comes of it (force_kv)."
        )
    return kv


def choose_implementation(implementation: Implementation, decoder: DecoderAdapter) -> Literal["reference", "triton"]:
    """``triton`` or ``reference``, of the kernels; one warning where a GPU is there that Triton cannot use.

    Raises:
        EngineError: Triton is asked for, and cannot run there.
    """
    device = decoder.device
    try:
        chosen = implementation_on(device, implementation)
    except (ValueError, RuntimeError) as error:
        raise EngineError(str(error)) from error
    if implementation == "auto" and device.type == "cuda" and chosen != "triton":
        _warn_once(f"Kernels run in PyTorch on {device}: {why_not_triton(device)}.")
    return chosen


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def loop_obstacle(decoder: DecoderAdapter, *, lockstep: bool) -> str | None:
    """What keeps new tokens from running in the loop on the device; None if nothing does."""
    if decoder.is_routed:
        return "models with routers"
    if decoder.head is None:
        return f"a model whose LM head is a {type(decoder.model.get_output_embeddings()).__name__}"
    return "a lockstep engine" if lockstep else None


def eos_tokens(model: Any) -> frozenset[int]:
    """The tokens with which the model ends a text."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    eos = model.config.eos_token_id if eos is None else eos
    return frozenset() if eos is None else frozenset(eos if isinstance(eos, list) else [eos])


@torch.inference_mode()
def check_parity(runner: ModelRunner) -> None:
    """Raises:
    UnsupportedModelError: What the engine computes of a few tokens at full depth is not what the model does.
    """
    decoder, pages = runner.decoder, runner.kv_cache
    count = min(5, pages.context, pages.page_size * pages.pools[0].num_pages)
    if decoder.is_routed:
        return  # where its tokens go is its own
    ids = torch.arange(3, 3 + count, device=decoder.device) % decoder.config.vocab_size
    expected = decoder.model(ids[None], use_cache=False).logits[0, -1].float()
    request = Request(ids.tolist(), SamplingParams(), None, len(pages.pools))
    pages.reserve(request, count)
    with decoder.in_use():
        _, states = runner.enter(ids, [TokenSpan(request, None, range(count))])
        for depth in range(decoder.num_depths):
            states = runner.block([TokenSpan(request, depth, range(count))], states)
        states = runner.coda([TokenSpan(request, None, range(count))], states)
        found = runner.compute_logits(states)[-1].float()
    pages.release(request)
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
    if not difference <= PARITY.get(decoder.dtype, 0.1):
        raise UnsupportedModelError(
            f"The engine does not compute what this {decoder.config.model_type} model does: logits differ by "
            f"{difference:.2g} of the largest. It does something outside its layers that the engine does not know."
        )


def encode(prompt: str | Sequence[int], tokenizer: Any, vocabulary: int) -> list[int]:
    """Token ids of a prompt.

    Raises:
        EngineError: It has none, they are not in the vocabulary, or it is text and there is no tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise EngineError("A prompt that is text needs a tokenizer. Give the engine one, or pass token ids.")
        prompt = tokenizer(prompt)["input_ids"]
    try:
        ids = list(map(int, prompt))
    except (TypeError, ValueError) as error:
        raise EngineError(f"A prompt is text or a list of token ids: {error}.") from error
    if not ids:
        raise EngineError("The prompt has no tokens. Give at least one.")
    wrong = [token for token in ids if not 0 <= token < vocabulary]
    if wrong:
        raise EngineError(f"Token {wrong[0]} of the prompt is not in the vocabulary of {vocabulary}.")
    return ids


def exit_settings(params: SamplingParams, decoder: DecoderAdapter, kv: str) -> ExitSettings | None:
    """How tokens of a request leave, in an engine whose mode is ``kv``.

    Raises:
        EngineError: The model or the engine cannot do that.
    """
    num_exits = decoder.num_depths - 1
    if params.may_exit_early and (decoder.is_routed or not num_exits):
        why = "has routers, which say how far a token goes" if decoder.is_routed else "has no exits"
        raise EngineError(f"The model {why}. Leave exit, max_depth and forced_depths out.")
    if params.exit is None:
        return None
    try:
        settings = ExitSettings.from_options(params.exit, kv=kv, config=decoder.config)
        check_depths(settings, num_exits)
        settings.policy.check_vocabulary(decoder.config.vocab_size)
    except ValueError as error:
        raise EngineError(str(error)) from error
    if settings.kv != kv:
        raise EngineError(f"The exit settings have kv '{settings.kv}', and the engine '{kv}'. Use one of them.")
    if settings.layers is not None or settings.adapt is not None:
        raise EngineError("The engine exits at recursion boundaries, at given thresholds: leave layers and adapt out.")
    if settings.policy.simulated:
        raise EngineError(
            f"Policy '{settings.policy.name}' is a simulation: it runs all depths to know where it could have stopped. "
            f"Use it with recursify generate."
        )
    if settings.policy.needs_head and decoder.model.exit_heads is None:
        raise EngineError(
            f"Policy '{settings.policy.name}' needs exit heads, and the model has none. Train them (recursify uptrain "
            f"--stage exits), or use policy 'confidence'."
        )
    return settings
