"""From what a request says to token ids: the tokenizer and the chat template of the model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError

from .errors import ApiError
from .schema import Message

T = TypeVar("T")


class Prompts:
    """Encodes prompts, in one thread of its own: a long one does not hold up the answers that are being sent.

    Args:
        tokenizer: Of the model.
        max_tokens: Of a prompt.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        # Fast tokenizers complain of being borrowed when two threads encode at once.
        self._pool = ThreadPoolExecutor(1, "recursify-tokenizer")

    async def completions(self, prompt: str | Sequence[Any]) -> list[list[int]]:
        """The prompts of a completion: one or several, as text or as ids."""
        several: list[Any] = (
            [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else [*prompt]
        )
        if not several:
            raise ApiError(400, "prompt: There is none in the list. Give at least one.", param="prompt")
        texts = [each for each in several if isinstance(each, str)]
        if not texts:
            return [self._fitting(list(each), "prompt") for each in several]
        encoded = await self._run(lambda: [self.tokenizer(text)["input_ids"] for text in texts])
        return [self._fitting(ids, "prompt") for ids in encoded]

    async def chat(self, messages: Sequence[Message]) -> list[int]:
        """A conversation, in the model's template, up to where the model goes on.

        Raises:
            ApiError: The model has no template, or its template does not take this.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ApiError(400, "The model has no chat template. Use /v1/completions.", code="no_chat_template")
        given = [
            {"role": message.role, "content": message.text} | ({"name": message.name} if message.name else {})
            for message in messages
        ]
        try:
            found = await self._run(
                lambda: self.tokenizer.apply_chat_template(given, add_generation_prompt=True, return_dict=True)
            )
        except TemplateError as error:
            raise ApiError(400, f"messages: The model's chat template says: {error}", param="messages") from error
        return self._fitting(found["input_ids"], "messages")

    def text_of(self, ids: Sequence[int]) -> str:
        """What ``ids`` say."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """Let the thread go."""
        self._pool.shutdown(wait=False)

    def _fitting(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise ApiError(400, f"{param}: It has no tokens. Give at least one.", param=param)
        if len(ids) > self.max_tokens:
            message = f"{param}: It has {len(ids)} tokens, and {self.max_tokens} are allowed. Shorten it."
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        return ids
