"""The decoding loop of ``generate`` with an exit policy.

Shape legend: B rows of the batch, T columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .recursive_decoding import DepthDecoder, Step
from .recursive_exit_settings import ExitSettings

REFUSED = (
    "inputs_embeds",
    "exit_depth",
    "num_recursions",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "past_key_values",
    "cache",
)
"""Arguments of ``generate`` that neither early exit nor speculation supports."""


@dataclass
class ExitGenerateOutput(GenerateDecoderOnlyOutput):
    """Output of ``generate(exit_policy=…, return_dict_in_generate=True)``.

    Attributes:
        exit_depths: Exit ``[B, new]`` of each new token; the number of exits where all layers ran, as for the first
            token always; -1 in padding.
        layers_run: Number of layers ``[B]`` that ran for the new tokens of each row, the coda of exits included. A call
            for several tokens of a row counts once; projecting only keys and values (``copied``) does not count.
        block_calls: Number of segment calls, for all rows together.
    """

    exit_depths: Tensor | None = None
    layers_run: Tensor | None = None
    block_calls: int | None = None


def refuse_arguments(model: Any, given: dict[str, Any]) -> None:
    """Refuse the arguments in :data:`REFUSED`, and a tool that puts inputs of its own in front of the prompt (peft)."""
    for name in REFUSED:
        if given.get(name) is not None:
            raise ValueError(
                f"{name} works neither with an exit policy nor with speculation, which decide themselves how far a "
                f"token runs, from ids. Leave it out."
            )
    preparing = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", model)
    if preparing is not model:
        raise ValueError(
            f"A {type(preparing).__name__} prepares the inputs of generate, and neither an exit policy nor speculation "
            f"supports its virtual tokens. Call generate without them."
        )


def _by_row(given: Sequence[ExitSettings], num_rows: int, num_beams: int) -> list[ExitSettings]:
    """Settings of every row, given one for all or one per prompt (a prompt may have several rows)."""
    if num_beams > 1:
        raise ValueError(
            f"An exit policy works with one beam, and num_beams is {num_beams}: beams that are reordered would take "
            f"one another's pending tokens. Leave num_beams out."
        )
    if not given or num_rows % len(given):
        raise ValueError(f"exit_policy has {len(given)} settings for {num_rows} rows. Give one, or one per prompt.")
    alike = {(type(entry.policy), entry.policy.vocabulary, entry.kv, entry.layers, entry.adapt) for entry in given}
    if len(alike) > 1:
        raise ValueError(
            "The rows of a batch share one kind of policy, vocabulary, kv, layers and adapt; only thresholds, "
            "min_depth, max_pending and decay may differ. Use separate calls of generate for others."
        )
    return [entry for entry in given for _ in range(num_rows // len(given))]


def generate_with_exits(
    model: Any,
    input_ids: Tensor,
    *,
    settings: Sequence[ExitSettings],
    streamer: Any = None,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Any:
    """Decode for ``generate(exit_policy=…)``, which passes everything that it has prepared.

    Returns:
        Token ids ``[B, T]``, or :class:`ExitGenerateOutput` if the generation config asks for one.

    Raises:
        ValueError: Beams, settings that do not fit the model, or right padding.
    """
    settings = _by_row(settings, len(input_ids), generation_config.num_beams)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    decoder = DepthDecoder(model, settings, mask, generation_config.max_length)
    pad = generation_config._pad_token_tensor
    rows = list(range(len(input_ids)))
    unfinished = torch.ones(len(rows), dtype=torch.bool, device=input_ids.device)
    step = Step(input_ids.new_full((len(rows),), decoder.num_exits), decoder.prefill(input_ids), rows)
    exit_depths, all_scores, all_logits = [], [], []
    while step.rows:
        assert step.logits is not None
        scores = logits_processor(input_ids, step.logits.to(torch.float32))
        tokens = scores.argmax(-1)
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        if pad is not None:
            tokens = torch.where(unfinished, tokens, pad)
        exit_depths.append(torch.where(unfinished, step.exits, -1))
        if generation_config.output_scores:
            all_scores.append(scores)
        if generation_config.output_logits:
            all_logits.append(step.logits)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, tuple(all_scores) or None)
        if input_ids.shape[1] >= generation_config.max_length:
            break
        step = decoder.step(tokens, step.rows, unfinished)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return ExitGenerateOutput(
        sequences=input_ids,
        scores=tuple(all_scores) or None,
        logits=tuple(all_logits) or None,
        exit_depths=torch.stack(exit_depths, dim=1),
        layers_run=torch.tensor(decoder.layers_run),
        block_calls=decoder.block_calls,
    )
