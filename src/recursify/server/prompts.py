"""Encoding of prompts and conversations with the model's tokenizer and chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from recursify.chat_template import check_template_kwargs, render_chat
from recursify.errors import SettingsError, TextError

from .errors import ApiError
from .schema import ChatRequest, Message

T = TypeVar("T")


class PromptEncoder:
    """Encodes prompts of at most ``max_tokens`` in a thread of its own, so that they do not delay the event loop."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        # A single thread: fast tokenizers raise "Already borrowed" when two threads encode at once.
        self._pool = ThreadPoolExecutor(1, "recursify-tokenizer")

    async def encode_completion(
        self, prompt: str | Sequence[Any], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Encode the prompts of a completion, one or several; raise an ApiError if one is empty or too long."""
        is_single = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        prompts: list[Any] = [prompt] if is_single else [*prompt]
        if not prompts:
            raise ApiError(400, "prompt: The list is empty. Give at least one prompt.", param="prompt")
        if isinstance(prompts[0], str):
            encode = partial(self.tokenizer, add_special_tokens=add_special_tokens)
            prompts = await self._run(lambda: [encode(text)["input_ids"] for text in prompts])
        return [self._checked([*ids], "prompt") for ids in prompts]

    async def encode_chat(self, request: ChatRequest) -> list[int]:
        """Encode a conversation with the chat template, for a reply.

        Raises:
            ApiError: There is no template, it rejects the messages, or the prompt is too long.
        """
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise ApiError(400, "The model has no chat template. Use /v1/completions.", code="no_chat_template")
        options = request.chat_template_kwargs or {}
        try:
            check_template_kwargs(options)
        except SettingsError as error:
            raise ApiError(400, str(error), param="chat_template_kwargs") from error
        continues = bool(request.continue_final_message)
        begins = not continues if request.add_generation_prompt is None else request.add_generation_prompt
        render = partial(
            render_chat,
            self.tokenizer,
            _conversation(request.messages, str(template)),
            add_generation_prompt=begins,
            continue_final_message=continues,
            return_dict=True,
            **options,
        )
        try:
            encoding = await self._run(render)
        except TextError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from error
        return self._checked(encoding["input_ids"], "messages")

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode ``ids``."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False)

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise ApiError(400, f"{param}: It has no tokens. Give at least one.", param=param)
        if len(ids) > self.max_tokens:
            message = f"{param}: It has {len(ids)} tokens; at most {self.max_tokens} are allowed. Shorten it."
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        return ids


def _conversation(messages: Sequence[Message], template: str) -> list[dict[str, str]]:
    """Messages as a template takes them: ``developer`` is the newer name of ``system``, which few templates know."""
    knows_developer = "developer" in template
    return [
        {
            "role": "system" if message.role == "developer" and not knows_developer else message.role,
            "content": message.text,
        }
        | ({"name": message.name} if message.name else {})
        for message in messages
    ]
