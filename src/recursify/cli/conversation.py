"""A conversation with an engine, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from recursify.engine import Engine, SamplingParams
from recursify.errors import SettingsError
from recursify.modeling import ExitSettings, make_policy
from recursify.modeling.recursive_policies import KV_MODES


class Conversation:
    """What has been said, and who says the next.

    Args:
        engine: With a tokenizer that has a chat template.
        params: Of every answer.
        system: What the model is told first.
    """

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None = None) -> None:
        self.engine, self.params, self.system = engine, params, system
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def say(self, text: str) -> Iterator[tuple[str, int]]:
        """The answer to ``text``: for every token, what it adds, and the depth that it was read at.

        Raises:
            EngineError: The conversation has become too long; ``text`` is not part of it, then.
        """
        engine, messages = self.engine, [*self.messages, {"role": "user", "content": text}]
        found = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        prompt = found["input_ids"]
        room = max(engine.max_model_len - len(prompt), 1)
        request = engine.requests[
            engine.add(prompt, replace(self.params, max_tokens=min(self.params.max_tokens, room)))
        ]
        output, shown, tokens = request.output, 0, 0
        try:
            while not output.finished:
                engine.step()
                if len(output.token_ids) > tokens:
                    tokens = len(output.token_ids)
                    yield output.text[shown:], output.depths[-1]
                    shown = len(output.text)
        finally:
            engine.cancel(output.request_id)
            self.messages = [*messages, {"role": "assistant", "content": output.text}]


def exit_settings(
    config: Any, kv: str, policy: str | None, threshold: float | None, min_depth: int
) -> ExitSettings | None:
    """How tokens leave, from what a command line says.

    Raises:
        SettingsError: An unknown policy, or a value outside its range.
    """
    if policy is None:
        if threshold is not None or min_depth:
            raise SettingsError("--threshold and --min-depth are for --exit, which is not given. Name a policy.")
        return None
    try:
        # A routed model has a kv of its own, and the engine says that such a model has no exits.
        kept = kv if kv in KV_MODES else "deferred"
        return ExitSettings(make_policy(policy, threshold, config), kv=kept, min_depth=min_depth)
    except ValueError as error:
        raise SettingsError(str(error)) from error
