"""``recursify chat``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

import typer
from annotated_types import Ge
from pydantic import NonNegativeInt, PositiveInt
from rich.console import Console

import recursify
from recursify.errors import EngineError, SettingsError
from recursify.settings import ExitOptions, SamplingOptions

from .conversation import Conversation
from .depth_view import counts_by_depth, depth_style
from .from_settings import options_from_settings
from .options import LoadingOptions, ModelArgument
from .report import talk

HELP = """
Chat with a model in the terminal. `/new` starts a new conversation, `/quit` (or Ctrl-D) ends the program, Ctrl-C stops
an answer. Every line of piped input gets an answer.

**Examples**

`recursify chat smollm2-healed`

`recursify chat smollm2-exits --exit head --threshold 0.9 --show-depth`

`echo "What is a recursion?" | recursify chat smollm2-healed --max-tokens 60`
"""

ANSWER_TOKENS = 512
"""Maximum number of new tokens of an answer where neither the user nor the model sets it."""


class ChatSettings(ExitOptions, SamplingOptions):
    """Options of ``recursify chat``."""

    panels: ClassVar[Mapping[str, str]] = {
        "system": "Generation",
        "temperature": "Generation",
        "exit_policy": "Early exit",
        "max_depth": "Early exit",
    }

    system: str | None = None
    """System message."""
    max_tokens: PositiveInt | None = None
    """Maximum number of new tokens per answer. Without it, the model's own (max_new_tokens), else 512."""
    kv_cache_memory_bytes: PositiveInt = 2**28
    """Memory of the KV cache in bytes."""
    max_model_len: Annotated[int, Ge(2)] | None = None
    """Maximum number of tokens of the conversation. Without it, the model's context."""
    max_depth: NonNegativeInt | None = None
    """Last depth that new tokens run. Without it, the last one."""


@options_from_settings
def command(
    model: ModelArgument,
    loading: LoadingOptions,
    settings: ChatSettings,
    show_depth: Annotated[bool, typer.Option("--show-depth", help="Colour each token by its depth.")] = False,
) -> None:
    loaded, tokenizer = recursify.load_model(model, **vars(loading))
    if not getattr(tokenizer, "chat_template", None):
        raise SettingsError(f"'{model}' has no chat template, so it cannot chat. Use recursify generate.")
    engine = recursify.Engine(
        loaded,
        tokenizer,
        max_num_seqs=1,
        kv_cache_memory_bytes=settings.kv_cache_memory_bytes,
        max_model_len=settings.max_model_len,
    )
    conversation = Conversation(engine, _sampling_params(settings, engine, loaded.config), settings.system)
    for line in _lines():
        if line == "/new":
            conversation.begin()
            talk.print("(a new conversation)")
        else:
            _answer(conversation, line, engine.decoder.num_depths, show_depth=show_depth)


def _sampling_params(
    settings: ChatSettings, engine: recursify.Engine, config: recursify.RecursiveConfig
) -> recursify.SamplingParams:
    defaults = engine.defaults
    limits: dict[str, Any] = {"threshold": settings.threshold, "min_depth": settings.min_depth}
    try:
        exit = recursify.ExitSettings.from_options(settings.exit_policy, kv=engine.kv, config=config, **limits)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return recursify.SamplingParams(
        max_tokens=settings.max_tokens or defaults.max_new_tokens or ANSWER_TOKENS,
        seed=settings.seed,
        exit=exit,
        max_depth=settings.max_depth,
        **defaults.sampling(vars(settings)),
    )


def _lines() -> Iterator[str]:
    """Messages of the user, without empty lines."""
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def _answer(conversation: Conversation, line: str, num_depths: int, *, show_depth: bool) -> None:
    """Print an answer token by token."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    depths: list[int] = []
    try:
        for text, depth in conversation.say(line):
            depths.append(depth)
            console.print(text, end="", style=depth_style(depth, num_depths) if show_depth else None)
    except KeyboardInterrupt:
        talk.print(" (interrupted)")
    except EngineError as error:
        talk.print(f"{error} Or start again with /new.")
        return
    console.print()
    if show_depth and depths:
        console.print(counts_by_depth(depths, num_depths))
