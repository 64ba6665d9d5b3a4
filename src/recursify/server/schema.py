"""What requests may contain: OpenAI's fields that this server has a meaning for, and three kinds of its own.

A field that is not known is refused by name, and so is a known one with a value that would be ignored: an answer is
what was asked for, or an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from .settings import ExitChoice


def _whole(text: str) -> str:
    """Raises:
    ValueError: Half a surrogate pair, which is no character and which no tokenizer takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text has a lone surrogate, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
StopText = Annotated[str, Field(min_length=1), AfterValidator(_whole)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Threshold = Annotated[float, Field(allow_inf_nan=False)]

IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")
"""What clients send along for OpenAI's own bookkeeping."""

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
"""What is not offered, and the values that ask for nothing."""


class Strict(BaseModel):
    """Knows its fields, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ExitRequest(Strict):
    """How new tokens leave early. Lossy: the answer is another one than without."""

    policy: str | None = None
    threshold: Threshold | Annotated[list[Threshold], Field(min_length=1, max_length=64)] | None = None
    min_depth: int = Field(default=0, ge=0, le=1000)
    max_depth: int | None = Field(default=None, ge=0, le=1000)

    @property
    def choice(self) -> ExitChoice:
        """As the settings have it."""
        threshold = tuple(self.threshold) if isinstance(self.threshold, list) else self.threshold
        return ExitChoice(policy=self.policy, threshold=threshold, min_depth=self.min_depth, max_depth=self.max_depth)


class StreamOptions(Strict):
    """How an answer is streamed."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class AnswerRequest(Strict):
    """What completions and chats have in common."""

    model: Text | None = Field(default=None, max_length=500)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    n: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopText | list[StopText] | None = None
    stop_token_ids: list[Token] | None = Field(default=None, max_length=64)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    exit: ExitRequest | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_what_asks_for_nothing(cls, given: Any) -> Any:
        """Raises:
        ValueError: Something that is not offered.
        """
        if not isinstance(given, dict):
            return given
        kept = {name: value for name, value in given.items() if name not in IGNORED}
        for name, neutral in NEUTRAL.items():
            if name in kept and kept.pop(name) not in neutral:
                raise ValueError(f"{name} is not offered by this server, leave it out")
        return kept

    @model_validator(mode="after")
    def check_stream_options(self) -> AnswerRequest:
        """Raises:
        ValueError: Options of a stream that was not asked for.
        """
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true, which is not given")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def exit_is_given(self) -> bool:
        """Whether the request says how tokens leave; null says that they do not."""
        return "exit" in self.model_fields_set


class CompletionRequest(AnswerRequest):
    """``POST /v1/completions``."""

    prompt: Text | list[Text] | list[Token] | list[list[Token]] = Field(union_mode="left_to_right")
    max_tokens: int | None = Field(default=None, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None

    @model_validator(mode="after")
    def check_echo(self) -> CompletionRequest:
        """Raises:
        ValueError: A prompt to be repeated in a stream.
        """
        if self.echo and self.stream:
            raise ValueError("echo is not offered with stream=true")
        return self


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    @property
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(AnswerRequest):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def check_logprobs(self) -> ChatRequest:
        """Raises:
        ValueError: First choices without log-probabilities.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs=true, which is not given")
        return self
