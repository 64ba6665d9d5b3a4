"""One prompt continued, timed, and what there is to say of it; behind ``recursify generate``."""

from __future__ import annotations

import time
from typing import Any

import torch

from recursify.errors import SettingsError


class Generation:
    """A call of ``generate``, and the plain one beside it.

    Args:
        model: Recursive or dense.
        tokenizer: Its tokenizer.
        inputs: Ids and mask of one prompt.
        arguments: Of transformers' ``generate``.
        seed: Of sampling.
        exits: ``ExitSettings``, or None.
        speculate: Whether an exit drafts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        inputs: Any,
        arguments: dict[str, Any],
        *,
        seed: int,
        exits: Any = None,
        speculate: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.inputs, self.seed = model, tokenizer, inputs, seed
        self.arguments = {**inputs, **arguments, "return_dict_in_generate": True}
        self.exits, self.speculate = exits, speculate
        self.prompt_length: int = inputs["input_ids"].shape[1]
        self.routed = _routed_cache(model)

    @property
    def takes_a_shortcut(self) -> bool:
        """Whether there is plain decoding to compare it with."""
        return self.exits is not None or self.speculate

    def run(self, *, warm: bool) -> None:
        """Write, and keep the output and the seconds; with ``warm``, what a first call costs is not among them.

        Raises:
            SettingsError: The model cannot generate so.
        """
        shortcut: dict[str, Any] = dict(self.routed or {})
        if self.exits is not None:
            shortcut["exit_policy"] = self.exits
        if self.speculate:
            shortcut["speculate"] = True
        if warm and self.takes_a_shortcut:
            self.model.generate(**{**self.arguments, "max_new_tokens": 2})
        try:
            self.output, self.seconds = self._timed(**shortcut)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        self.new = self.output.sequences[0, self.prompt_length :]

    def _timed(self, **more: Any) -> tuple[Any, float]:
        torch.manual_seed(self.seed)
        started = time.perf_counter()
        return self.model.generate(**self.arguments, **more), time.perf_counter() - started

    def facts(self, *, beside_plain: bool) -> dict[str, Any]:
        """What was written and how fast; with ``beside_plain``, also how fast plain decoding of a shortcut is."""
        facts: dict[str, Any] = {
            "text": self.tokenizer.decode(self.new, skip_special_tokens=True),
            "num_tokens": len(self.new),
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(len(self.new) / self.seconds, 2),
        }
        if self.speculate:
            facts |= {"drafted": int(self.output.drafted[0]), "accepted": int(self.output.accepted[0])}
        if beside_plain and self.takes_a_shortcut:
            whole, seconds = self._timed()
            count = whole.sequences.shape[1] - self.prompt_length
            facts["tokens_per_second_at_full_depth"] = round(count / seconds, 2)
        return facts

    def depths(self) -> list[int] | None:
        """Per new token, the last recursion of the forward that it was read from; None where that means nothing."""
        if self.model.config.model_type != "recursive" or self.speculate:
            return None
        if self.routed is not None:
            (cache,) = self.routed.values()
            last = self.prompt_length - 1
            return cache.depths[0, last : last + len(self.new)].tolist()
        if self.exits is not None:
            return self.output.exit_depths[0].tolist()
        config = self.model.config
        return [config.num_recursions - 1 if config.exit_depth is None else config.exit_depth] * len(self.new)


def _routed_cache(model: Any) -> dict[str, Any] | None:
    """The argument of ``generate`` that will hold the depths of a routed model's tokens; None for other models."""
    if getattr(model.config, "router", None) is None:
        return None
    from recursify.modeling import RoutedCache
    from recursify.modeling.modeling_recursive import CACHE_ARGUMENT

    return {CACHE_ARGUMENT: RoutedCache(model.config)}
