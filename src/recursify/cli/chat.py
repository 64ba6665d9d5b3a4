"""``recursify chat``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

import recursify
from recursify.errors import EngineError, SettingsError

from .conversation import Conversation
from .depth_view import counts_by_depth, depth_style
from .options import (
    DeviceOption,
    DtypeOption,
    ExitOption,
    MaxDepthOption,
    MinDepthOption,
    ModelArgument,
    SeedOption,
    TemperatureOption,
    ThresholdOption,
    TopPOption,
    TrustOption,
)
from .report import talk

HELP = """
Chat with a model in the terminal. `/new` starts a new conversation, `/quit` (or Ctrl-D) ends the program, Ctrl-C stops
an answer. Every line of piped input gets an answer.

**Examples**

`recursify chat smollm2-healed`

`recursify chat smollm2-exits --exit head --threshold 0.9 --show-depth`

`echo "What is a recursion?" | recursify chat smollm2-healed --max-tokens 60`
"""


def command(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option("--system", help="System message.", show_default=False)] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="Maximum number of new tokens per answer.", min=1)
    ] = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    exit_policy: ExitOption = None,
    threshold: ThresholdOption = None,
    min_depth: MinDepthOption = 0,
    max_depth: MaxDepthOption = None,
    show_depth: Annotated[bool, typer.Option("--show-depth", help="Colour each token by its depth.")] = False,
    kv_cache_memory_bytes: Annotated[
        int, typer.Option("--kv-cache-memory-bytes", help="Memory of the KV cache in bytes.", min=1)
    ] = 2**28,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len",
            help="Maximum number of tokens of the conversation. Without it, the model's context.",
            min=2,
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
) -> None:
    loaded, tokenizer = recursify.load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if not getattr(tokenizer, "chat_template", None):
        raise SettingsError(f"'{model}' has no chat template, so it cannot chat. Use recursify generate.")
    engine = recursify.Engine(
        loaded, tokenizer, max_num_seqs=1, kv_cache_memory_bytes=kv_cache_memory_bytes, max_model_len=max_model_len
    )
    try:
        exits = recursify.ExitSettings.from_options(
            exit_policy, threshold=threshold, kv=engine.kv, config=loaded.config, min_depth=min_depth
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error
    params = recursify.SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, exit=exits, max_depth=max_depth
    )
    conversation = Conversation(engine, params, system)
    for line in _lines():
        if line == "/new":
            conversation.begin()
            talk.print("(a new conversation)")
        else:
            _answer(conversation, line, engine.decoder.num_depths, show_depth=show_depth)


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
