"""Request bodies: OpenAI's fields that this server supports, and three kinds of its own.

An unknown field is refused by name, and so is a known one with a value that would be ignored: a request is executed as
written, or refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _without_surrogates(text: str) -> str:
    """Raise a ValueError for text with a lone surrogate, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("The text has a lone surrogate, which is not a character. Remove it") from None
    return text


Text = Annotated[str, AfterValidator(_without_surrogates)]
StopText = Annotated[str, Field(min_length=1), AfterValidator(_without_surrogates)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Threshold = Annotated[float, Field(allow_inf_nan=False)]

IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")
"""Fields for OpenAI's own bookkeeping, which are accepted and ignored."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "suffix": ("", None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
    "best_of": (1, None),
}
"""Mapping from unsupported fields to their values without an effect, which are accepted."""


class Strict(BaseModel):
    """Model that refuses unknown fields and does not convert types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ExitRequest(Strict):
    """Early exit of new tokens. It changes the output: a token that exits early may differ from the full model's."""

    policy: str | None = None
    threshold: Threshold | Annotated[list[Threshold], Field(min_length=1, max_length=64)] | None = None
    min_depth: int = Field(default=0, ge=0, le=1000)
    max_depth: int | None = Field(default=None, ge=0, le=1000)


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class GenerationRequest(Strict):
    """Fields of both completions and chats."""

    model: Text | None = Field(default=None, max_length=500)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    n: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopText | list[StopText] | None = None
    stop_token_ids: list[Token] | None = Field(default=None, max_length=64)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    exit: ExitRequest | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_neutral_fields(cls, body: Any) -> Any:
        """Drop fields without an effect; raise a ValueError for an unsupported one that would have an effect."""
        if not isinstance(body, dict):
            return body
        supported = {name: value for name, value in body.items() if name not in IGNORED}
        for name, neutral in NEUTRAL.items():
            if name in supported and supported.pop(name) not in neutral:
                raise ValueError(f"{name} is not supported by this server. Remove it")
        return supported

    @model_validator(mode="after")
    def check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options requires stream=true. Set it")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: Text | list[Text] | list[Token] | list[list[Token]] = Field(union_mode="left_to_right")
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None

    @model_validator(mode="after")
    def check_echo(self) -> CompletionRequest:
        if self.echo and self.stream:
            raise ValueError("echo is not supported with stream=true. Remove one of them")
        return self


class TextPart(Strict):
    """Part of a message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """Message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    @property
    def text(self) -> str:
        """Text of all parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def check_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs=true. Set it")
        return self
