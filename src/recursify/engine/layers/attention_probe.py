"""Facts about a layer's attention that only a call tells: the shapes of keys and values, and whether it rotates.

A layer is called with one row and ended at its attention function (:mod:`.paged_attention`), so only norms and
projections run. Neither a name in the config nor an attribute says these things for all families: heads of unlike
sizes (MLA), RoPE in windowed layers only (EXAONE 4), attention that is no attention function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recursify.errors import UnsupportedModelError
from recursify.modeling.recursive_columns import KeysAndValuesWritten

from .paged_attention import ATTENTION_NAME, attending

POSITION = 7
"""Position of the probed row; RoPE changes nothing at 0."""


class AttentionProbe:
    """Attention batch that keeps what it is given, and ends the layer there."""

    only_writes = True
    key: Tensor
    value: Tensor

    def store(self, layer: Any, key: Tensor, value: Tensor) -> None:
        """Keep ``key`` and ``value [N, K, D]``."""
        self.key, self.value = key, value


@contextmanager
def engine_attention(config: Any) -> Iterator[None]:
    """Make the layers of a model with ``config`` call the engine's attention, and restore the model's own afterwards.

    Another thread that calls the model meanwhile gets the engine's attention too.
    """
    attention = config._attn_implementation
    config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = attention


@torch.inference_mode()
def probe(layer: nn.Module, config: Any, states: Tensor, rotations: Any) -> AttentionProbe:
    """Call ``layer`` with ``states [1, 1, D]`` and its RoPE's cosines and sines.

    Raises:
        UnsupportedModelError: The layer does not get to the engine's attention; the message has the reason.
    """
    seen = AttentionProbe()
    try:
        with engine_attention(config), attending(seen):
            layer(
                states,
                attention_mask=None,
                position_embeddings=rotations,
                position_ids=torch.full((1, 1), POSITION, device=states.device),
                use_cache=False,
            )
    except KeysAndValuesWritten:
        return seen
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"The engine cannot run this {config.model_type} model: {type(layer).__name__} does not take a row by "
            f"itself ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Use transformers' "
            f"generate instead."
        ) from error
    names = [type(module).__name__ for module in layer.modules() if "Attention" in type(module).__name__]
    raise UnsupportedModelError(
        f"The engine cannot run this {config.model_type} model: {(names or [type(layer).__name__])[0]} computes "
        f"attention by itself, and not by transformers' attention functions, so its keys and values cannot be in "
        f"pages. Use transformers' generate instead."
    )


def rotates(layer: nn.Module, config: Any, states: Tensor, rotations: Any) -> bool:
    """True if ``layer`` rotates its keys by ``rotations``, cosines and sines at :data:`POSITION`."""
    cosines, sines = rotations
    still = (torch.ones_like(cosines), torch.zeros_like(sines))
    turned, plain = (probe(layer, config, states, given).key for given in (rotations, still))
    return turned.is_meta or not torch.equal(turned, plain)
