"""A recursive model with exit policies and self-speculation in ``generate``."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from .modeling_recursive import RecursiveForCausalLM as PlainForCausalLM
from .recursive_exit_generation import generate_with_exits, refuse_arguments
from .recursive_exit_settings import ExitSettings
from .recursive_exits import ExitHead, ExitKind
from .recursive_speculation import SpeculationSettings, generate_speculatively


class RecursiveForCausalLM(PlainForCausalLM):
    """A recursive model with its language-modelling head, early exit and self-speculation."""

    def add_exit_heads(self, kind: ExitKind, *, rank: int = 64, through_coda: bool = True) -> None:
        """Add an exit head at every boundary; each starts as the model's own norm and head.

        Args:
            kind: Kind of head, one of ``EXIT_HEADS``.
            rank: Rank of a ``low_rank`` head.
            through_coda: Flag to run the coda for a token that exits.

        Raises:
            ValueError: A layout without boundaries between recursions, or an unknown kind or rank.
        """
        self.config.change(exit_head=kind, exit_rank=rank, exit_through_coda=through_coda)
        self.exit_heads = self._make_exit_heads()
        for head in self.exit_heads:
            head.apply(self._init_weights)
            cast(ExitHead, head).copy_from(self.model.norm, self.lm_head)

    def generate(self, *arguments: Any, exit_policy: Any = None, speculate: Any = None, **kwargs: Any) -> Any:
        """transformers' ``generate``, and two ways to run fewer layers for a token.

        With an ``exit_policy`` every row of the batch exits on its own, which is lossy. With ``speculate`` an exit
        drafts and the whole model verifies: the output is that of the whole model.

        Args:
            arguments: Prompts ``[B, T]``, padded on the left, and further arguments of transformers' ``generate``.
            exit_policy: Name of a policy (``EXIT_POLICIES``), a policy, ``ExitSettings``, or a list of one per prompt.
            speculate: ``True``, or ``SpeculationSettings``.
            kwargs: Keyword arguments of transformers' ``generate``. Beams and assistants exclude both; sampling,
                logits processors, stopping criteria and streamers do not.

        Raises:
            ValueError: A model or arguments that do not support it.
        """
        if exit_policy is None and not speculate:
            return super().generate(*arguments, **kwargs)
        if exit_policy is not None and speculate:
            raise ValueError("Give exit_policy, which is lossy, or speculate, which is not; not both.")
        refuse_arguments(self, kwargs)
        streamer = kwargs.get("streamer")

        def decode(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
            prepared["streamer"] = streamer  # transformers does not pass it to custom methods
            if speculate:
                settings = SpeculationSettings() if speculate is True else speculate
                return generate_speculatively(model, input_ids, settings=settings, **prepared)
            policies: list[Any] = exit_policy if isinstance(exit_policy, list) else [exit_policy]
            by_prompt = [ExitSettings.from_options(entry, config=model.config) for entry in policies]
            return generate_with_exits(model, input_ids, settings=by_prompt, **prepared)

        return super().generate(*arguments, custom_generate=decode, **kwargs)

    def _extract_generation_mode_kwargs(self, custom_generate: Any, kwargs: dict[str, Any], *others: Any) -> Any:
        """transformers' own, which loses the ``tokenizer`` of stop strings if there is a custom method."""
        tokenizer = kwargs.get("tokenizer")
        extracted = super()._extract_generation_mode_kwargs(custom_generate, kwargs, *others)
        return extracted if tokenizer is None else {**extracted, "tokenizer": tokenizer}
