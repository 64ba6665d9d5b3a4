"""``recursify chat``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

from recursify.errors import EngineError, SettingsError

from .depth_view import counts_by_depth, depth_style
from .options import DeviceOption, DtypeOption, ModelArgument, TrustOption
from .report import talk
from .serving_options import (
    ExitOption,
    KVBytesOption,
    MaxDepthOption,
    MaxLengthOption,
    MinDepthOption,
    ThresholdOption,
)

EXAMPLES = """
Talk to a model in the terminal. `/new` begins again, `/quit` (or Ctrl-D) ends, Ctrl-C ends an answer. Lines that are
piped in are answered one after the other.

**Examples**

`recursify chat smollm2-healed`

`recursify chat smollm2-exits --exit head --threshold 0.9 --show-depth`

`echo "What is a recursion?" | recursify chat smollm2-healed --max-tokens 60`
"""


def register(app: typer.Typer) -> None:
    app.command("chat", help=EXAMPLES)(chat_command)


def chat_command(
    model: ModelArgument,
    system: Annotated[
        str | None, typer.Option("--system", help="What the model is told first.", show_default=False)
    ] = (None),
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="New tokens of one answer at most.", min=1)] = 512,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus when sampling.", min=0.01, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed when sampling.")] = 0,
    exit_policy: ExitOption = None,
    threshold: ThresholdOption = None,
    min_depth: MinDepthOption = 0,
    max_depth: MaxDepthOption = None,
    show_depth: Annotated[
        bool, typer.Option("--show-depth", help="Colour each token by the depth it was read at.")
    ] = False,
    kv_cache_memory_bytes: KVBytesOption = 2**28,
    max_model_len: MaxLengthOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
) -> None:
    from recursify.engine import Engine, SamplingParams

    from .conversation import Conversation, exit_settings
    from .models import load_model

    loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if not getattr(tokenizer, "chat_template", None):
        raise SettingsError(f"'{model}' has no chat template, so it cannot chat. Use recursify generate.")
    engine = Engine(
        loaded, tokenizer, max_num_seqs=1, kv_cache_memory_bytes=kv_cache_memory_bytes, max_model_len=max_model_len
    )
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        exit=exit_settings(loaded.config, engine.kv, exit_policy, threshold, min_depth),
        max_depth=max_depth,
    )
    conversation = Conversation(engine, params, system)
    for line in _lines():
        if line == "/new":
            conversation.begin()
            talk.print("(a new conversation)")
        else:
            _answer(conversation, line, engine.decoder.num_depths, show_depth=show_depth)


def _lines() -> Iterator[str]:
    """What the user says, without empty lines, until the end."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def _answer(conversation: Any, line: str, num_depths: int, *, show_depth: bool) -> None:
    """Print an answer as it comes."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    depths: list[int] = []
    try:
        for text, depth in conversation.say(line):
            depths.append(depth)
            console.print(text, end="", style=depth_style(depth, num_depths) if show_depth else None)
    except KeyboardInterrupt:
        talk.print(" (interrupted)")
    except EngineError as error:
        talk.print(f"{error} Or begin again: /new")
        return
    console.print()
    if show_depth and depths:
        console.print(counts_by_depth(depths, num_depths))
