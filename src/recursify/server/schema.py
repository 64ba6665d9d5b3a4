"""Request bodies: the fields of OpenAI and vLLM that this server supports, and its own.

A request is executed as written, or refused: an unknown field is refused by name, and so is a known one with a value
that would be ignored. Fields that ask for nothing are accepted: null, empty, or with the value of their absence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator


def _without_surrogates(text: str) -> str:
    """Raise a ValueError for text with a lone surrogate, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("The text has a lone surrogate, which is not a character. Remove it") from None
    return text


Text = Annotated[str, AfterValidator(_without_surrogates)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Threshold = Annotated[float, Field(allow_inf_nan=False)]

BOOKKEEPING = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "cache_salt",
    }
)
"""Fields for the bookkeeping of OpenAI and vLLM, which change no output; they are accepted and ignored."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    # vLLM's
    "priority": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
}
"""Mapping from unsupported fields of OpenAI and vLLM to their values without an effect, which are accepted."""


class Strict(BaseModel):
    """Model that refuses unknown fields and does not convert types. A field that is null counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    nullable: ClassVar[frozenset[str]] = frozenset()
    """Fields for which null has a meaning."""
    ignored: ClassVar[frozenset[str]] = frozenset()
    """Fields that are accepted, whatever their value."""
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Mapping from unsupported fields to their values without an effect."""

    @model_validator(mode="before")
    @classmethod
    def drop_neutral_fields(cls, body: Any) -> Any:
        """Drop fields without an effect; raise a ValueError for an unsupported one that would have an effect."""
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if name in cls.ignored or (value is None and name not in cls.nullable):
                continue
            if name not in cls.unsupported:
                kept[name] = value
            elif value not in cls.unsupported[name]:
                raise ValueError(f"{name} is not supported by this server. Remove it")
        return kept


class ExitRequest(Strict):
    """Early exit of new tokens. It changes the output: a token that exits early may differ from the full model's."""

    policy: str | None = None
    threshold: Threshold | Annotated[list[Threshold], Field(min_length=1, max_length=64)] | None = None
    min_depth: int = Field(default=0, ge=0, le=1000)
    max_depth: int | None = Field(default=None, ge=0, le=1000)


class StreamOptions(Strict):
    """Options of a stream. A response that is no stream always has its usage."""

    unsupported = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool = False


class GenerationRequest(Strict):
    """Fields of both completions and chats."""

    nullable = frozenset({"exit"})
    ignored = BOOKKEEPING
    unsupported = UNSUPPORTED

    model: Text | None = Field(default=None, max_length=500)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    n: int | None = Field(default=None, ge=1)
    best_of: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Text | list[Text] | None = None
    stop_token_ids: list[Token] | None = Field(default=None, max_length=64)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    exit: ExitRequest | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def drop_empty_stop(cls, stop: Any) -> Any:
        """Take an empty text for no stop string; raise a ValueError for one in a list."""
        if isinstance(stop, list) and "" in stop:
            raise ValueError("A stop string is empty. Remove it")
        return None if stop == "" else stop

    @field_validator("logit_bias")
    @classmethod
    def check_token_ids(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        """Raise a ValueError for a key that is not the number of a token."""
        for key in biases or ():
            if not (key.isascii() and key.isdigit() and len(key) <= 10):
                raise ValueError("The keys are token ids, as decimal numbers")
        return biases

    @model_validator(mode="after")
    def check_best_of(self) -> Self:
        """Raise a ValueError for ``best_of`` other than ``n``."""
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported by this server, unless it equals n. Remove it")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def biases(self) -> dict[int, float]:
        """Biases by token id."""
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: Text | list[Text] | list[Token] | list[list[Token]] = Field(union_mode="left_to_right")
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def check_echo(self) -> Self:
        """Raise a ValueError for a stream with ``echo``."""
        if self.echo and self.stream:
            raise ValueError("echo is not supported with stream=true. Remove one of them")
        return self


class TextPart(Strict):
    """Part of a message."""

    unsupported = {"annotations": ([],)}

    type: Literal["text"]
    text: Text


class Message(Strict):
    """Message of a chat; one of the assistant without content is empty."""

    unsupported = {
        "refusal": ("",),
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "tool_calls": ([],),
        "tool_call_id": ("",),
        "reasoning": ("",),
        "reasoning_content": ("",),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None

    @model_validator(mode="after")
    def check_content(self) -> Self:
        """Raise a ValueError for another's message without content."""
        if self.content is None and self.role != "assistant":
            raise ValueError(f"A message of role '{self.role}' needs content, a text or text parts")
        return self

    @property
    def text(self) -> str:
        """Text of all parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


class ChatRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    unsupported = {**UNSUPPORTED, "echo": (False,), "add_special_tokens": (False,)}

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_logprobs(self) -> Self:
        """Raise a ValueError for the number of log-probabilities that are not requested."""
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs=true. Set it")
        return self

    @model_validator(mode="after")
    def check_template_options(self) -> Self:
        """Raise a ValueError for a reply that both begins and continues a message."""
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message excludes add_generation_prompt=true. Remove one of them")
        return self
