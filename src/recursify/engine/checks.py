"""Checks before an engine runs, and before it accepts a request."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from recursify.checkpoint.vocabulary import require_known_tokens
from recursify.errors import ContextLengthError, EngineError, UnsupportedModelError
from recursify.kernels.dispatch import Implementation, implementation_on, why_not_triton
from recursify.modeling import ExitSettings
from recursify.modeling.configuration_recursive import ROUTED_KV
from recursify.modeling.recursive_exit_settings import check_depths
from recursify.modeling.recursive_exits import KV_MODES as EXIT_KV
from recursify.modeling.recursive_rope import length_limits

from .layers.batch import TokenSpan
from .layers.decoder import DecoderAdapter
from .layers.kv_cache import KVCache
from .layers.model_runner import ModelRunner
from .page_pool import pages_for
from .request import Request, SamplingParams

logger = logging.getLogger(__name__)

KV_MODES = (*EXIT_KV, *ROUTED_KV)
"""Sources of the keys and values of depths that a token skips: those of models with exits
(``recursive_exits.KV_MODES``), then those of routed models (``configuration_recursive.ROUTED_KV``)."""

PARITY = {torch.float64: 1e-2, torch.float32: 1e-2}
"""Parity tolerance relative to the largest logit, 0.1 in other dtypes. The order of sums differs from the model's
(measured: 1.3e-3 on a random Gemma 2 of eight layers); a missing operation makes a difference of order 1."""


def choose_kv(decoder: DecoderAdapter, kv: str | None, *, force: bool) -> str:
    """KV mode of the engine: ``kv``, or the mode that the model was trained with.

    Raises:
        EngineError: ``kv`` is unknown, or not the mode that the model was trained with.
    """
    if kv is not None and kv not in KV_MODES:
        raise EngineError(f"Unknown kv '{kv}'. Use one of: {', '.join(KV_MODES)}.")
    trained = decoder.config.router_kv if decoder.is_routed else getattr(decoder.config, "exit_kv", "deferred")
    if kv is None or kv == trained:
        return trained
    if decoder.is_routed or kv in ROUTED_KV:
        raise EngineError(f"This model does not support kv '{kv}', only its own '{trained}'. Leave kv out.")
    if not force:
        raise EngineError(
            f"The model was trained with '{trained}' keys and values; with '{kv}' early exits change its output. "
            f"Leave kv out, or accept that with force_kv."
        )
    return kv


def choose_implementation(implementation: Implementation, decoder: DecoderAdapter) -> Literal["reference", "triton"]:
    """Implementation of the kernels. Warns once about a GPU that Triton does not support.

    Raises:
        EngineError: Triton is requested, and cannot run on the device.
    """
    device = decoder.device
    try:
        chosen = implementation_on(device, implementation)
    except (ValueError, RuntimeError) as error:
        raise EngineError(str(error)) from error
    if not decoder.has_plain_heads:
        if implementation == "triton":
            raise EngineError(
                "This model's keys and values have unlike sizes, which the Triton kernels do not support. Leave "
                "implementation out."
            )
        return "reference"
    if implementation == "auto" and device.type == "cuda" and chosen != "triton":
        _warn_once(f"Kernels run in PyTorch on {device}: {why_not_triton(device)}.")
    return chosen


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def loop_obstacle(decoder: DecoderAdapter, *, lockstep: bool) -> str | None:
    """Description of the property that the device loop does not support; None if there is none."""
    if decoder.is_routed:
        return "models with routers"
    if decoder.head is None:
        return f"a model whose LM head is a {type(decoder.model.get_output_embeddings()).__name__}"
    if decoder.length_rope is not None:
        limit = min(limit for _, limit in length_limits(decoder.rotary))
        return f"RoPE that depends on the length of a request, as this model's does beyond max_model_len={limit}"
    if not decoder.has_plain_heads:
        return "keys and values of unlike sizes"
    return "a lockstep engine" if lockstep else None


@contextmanager
def refusing_by_name(model: Any) -> Iterator[None]:
    """Turn what a family's own code raises when it is called as the engine calls it into an error with its name.

    Raises:
        UnsupportedModelError: The family's code failed.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"The engine cannot run this {model.config.model_type} model ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Use transformers' generate instead."
        ) from error


@torch.inference_mode()
def check_parity(runner: ModelRunner) -> None:
    """Compare the engine's logits at full depth with the model's, for a few tokens.

    Routed models are not compared: the engine routes a token by itself, the model's forward by its sequence.

    Raises:
        UnsupportedModelError: The logits differ.
    """
    decoder, kv_cache = runner.decoder, runner.kv_cache
    if decoder.is_routed:
        return
    count = min(5, kv_cache.context, kv_cache.page_size * kv_cache.pools[0].num_pages)
    ids = torch.arange(3, 3 + count, device=decoder.device) % decoder.config.vocab_size
    expected = decoder.model(ids[None], use_cache=False).logits[0, -1].float()
    request = Request(ids.tolist(), SamplingParams(), None, len(kv_cache.pools))
    kv_cache.reserve(request, count)
    with decoder.in_use():
        for piece in (range(count - 1), range(count - 1, count)):  # the last token reads what the others have written
            _, states = runner.enter(ids[piece.start : piece.stop], [TokenSpan(request, None, piece)])
            for depth in range(decoder.num_depths):
                states = runner.block([TokenSpan(request, depth, piece)], states)
            states = runner.coda([TokenSpan(request, None, piece)], states)
        logits = runner.compute_logits(states)[-1].float()
    kv_cache.release(request)
    difference = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1))
    if not difference <= PARITY.get(decoder.dtype, 0.1):
        raise UnsupportedModelError(
            f"The engine does not reproduce this {decoder.config.model_type} model: logits differ by {difference:.2g} "
            f"of the largest. The model does something outside its layers that the engine does not know."
        )


def encode(prompt: str | Sequence[int], tokenizer: Any, vocab_size: int) -> list[int]:
    """Token ids of a prompt.

    Raises:
        EngineError: The prompt has no tokens or unknown ones, or it is text and there is no tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise EngineError("A text prompt needs a tokenizer. Give the engine one, or pass token ids.")
        prompt = tokenizer(prompt)["input_ids"]
    try:
        ids = list(map(int, prompt))
    except (TypeError, ValueError) as error:
        raise EngineError(f"A prompt is text or a list of token ids: {error}.") from error
    if not ids:
        raise EngineError("The prompt has no tokens. Give at least one.")
    require_known_tokens(ids, vocab_size, tokenizer, error=EngineError)
    return ids


def check_fits(prompt_length: int, params: SamplingParams, max_model_len: int, kv_cache: KVCache) -> None:
    """Check that a request fits into the engine's limits.

    Raises:
        ContextLengthError: The request has too many tokens.
        EngineError: The request needs more pages than there are.
    """
    longest = prompt_length + params.max_tokens
    if longest > max_model_len:
        raise ContextLengthError(
            f"The prompt has {prompt_length} tokens and max_tokens is {params.max_tokens}: together more than the "
            f"{max_model_len} that a request can have. Shorten one of them."
        )
    needed, available = pages_for(longest, kv_cache.page_size), min(pool.num_pages for pool in kv_cache.pools)
    if needed > available:
        raise EngineError(
            f"The request needs {needed} pages for {longest} tokens, and the engine has {available} in all. Increase "
            f"num_pages or kv_cache_memory_bytes, or request fewer tokens."
        )


def exit_settings(params: SamplingParams, decoder: DecoderAdapter, kv: str) -> ExitSettings | None:
    """Exit settings of a request, in an engine with KV mode ``kv``; None for no policy.

    Raises:
        EngineError: The model or the engine does not support them.
    """
    num_exits = decoder.num_depths - 1
    if params.may_exit_early and (decoder.is_routed or not num_exits):
        reason = "has routers, which decide how far a token goes" if decoder.is_routed else "has no exits"
        raise EngineError(f"The model {reason}. Leave exit, max_depth and forced_depths out.")
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
        raise EngineError("The engine exits after recursions only, at given thresholds. Leave layers and adapt out.")
    if settings.policy.simulated:
        raise EngineError(
            f"Policy '{settings.policy.name}' is a simulation: it runs all depths to know where it could have exited. "
            f"Use it with recursify generate."
        )
    if settings.policy.needs_head and decoder.model.exit_heads is None:
        raise EngineError(
            f"Policy '{settings.policy.name}' needs exit heads, and the model has none. Train them (recursify uptrain "
            f"--stage exits), or use policy 'confidence'."
        )
    return settings
