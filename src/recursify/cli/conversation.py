"""Conversation with an engine, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from recursify.chat_template import render_chat

if TYPE_CHECKING:
    from recursify import Engine, SamplingParams


class Conversation:
    """Messages of a conversation, and the engine that answers.

    Args:
        engine: Engine whose tokenizer has a chat template.
        params: Sampling parameters of every answer.
        system: System message.
    """

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None = None) -> None:
        self.engine, self.params, self.system = engine, params, system
        self.begin()

    def begin(self) -> None:
        """Start again with the system message alone."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def say(self, text: str) -> Iterator[tuple[str, int]]:
        """Stream the answer to ``text``: text and depth of every token.

        Raises:
            EngineError: The conversation is too long; ``text`` is not added to it.
            TextError: The chat template rejects the messages.
        """
        engine, messages = self.engine, [*self.messages, {"role": "user", "content": text}]
        encoded = render_chat(engine.tokenizer, messages, add_generation_prompt=True, return_dict=True)
        prompt = encoded["input_ids"]
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
