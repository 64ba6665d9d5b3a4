"""``recursify generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from recursify.errors import SettingsError

from .depth_view import DepthView, token_pieces
from .options import (
    AndersonOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    RecursionsOption,
    ResidualScaleOption,
    TrustOption,
    check_recursions,
)
from .report import print_data, print_json, print_styled, talk

EXAMPLES = """
Continue a prompt with a recursive (or dense) model. The prompt is an argument, or standard input.

**Examples**

`recursify generate smollm2-r2 "Once upon a time"`

`recursify generate smollm2-r2 "What is a recursion?" --chat --max-new-tokens 80`

`recursify generate smollm2-exits "Once upon a time" --exit head --threshold 0.9 --stats`

`recursify generate smollm2-exits "Once upon a time" --speculate --stats`

`recursify generate smollm2-r2 "Once upon a time" --recursions 3`

`recursify generate smollm2-routed "Once upon a time" --show-depth --depth-page depths.html`

`echo "def fibonacci(n):" | recursify generate smollm2-r2 --temperature 0.7 --seed 1 --stats`
"""


def register(app: typer.Typer) -> None:
    app.command("generate", help=EXAMPLES)(generate_command)


def generate_command(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; standard input if left out.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to write at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus when sampling.", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed when sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    exit_policy: Annotated[
        str | None,
        typer.Option(
            "--exit",
            help="Let tokens exit early, by: head, confidence, entropy, saturation, convergence, divergence, fixed "
            "(after the depth --threshold), oracle (a simulation). What comes out is not what the whole model says.",
            show_default=False,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            help="Exit above this confidence. [default: as calibrated, else the policy's]",
            show_default=False,
        ),
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(
            "--vocabulary",
            help="With --exit: judge by so many entries of the vocabulary, the first ones. [default: as calibrated]",
            show_default=False,
        ),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(
            "--kv",
            help="Keys and values of skipped depths: deferred (exact), copied, latest. [default: the model's own]",
            show_default=False,
        ),
    ] = None,
    min_depth: Annotated[int, typer.Option("--min-depth", help="First depth that tokens exit after.", min=0)] = 0,
    max_pending: Annotated[
        int, typer.Option("--max-pending", help="Tokens that may wait for their deferred depths.", min=1)
    ] = 64,
    speculate: Annotated[
        bool,
        typer.Option(
            "--speculate", help="Let the first recursion draft and the whole model check: its output, in fewer calls."
        ),
    ] = False,
    recursions: RecursionsOption = None,
    residual_scale: ResidualScaleOption = None,
    anderson: AndersonOption = 0,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats",
            help="Report tokens per second on stderr; with --exit or --speculate also what they did, beside plain "
            "decoding.",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="With --exit: draw where tokens left (.png, .svg).", show_default=False),
    ] = None,
    show_depth: Annotated[
        bool,
        typer.Option(
            "--show-depth",
            help="Colour each token by the depth it was read at, with routers or --exit; --json has the depths.",
        ),
    ] = False,
    depth_page: Annotated[
        Path | None,
        typer.Option("--depth-page", metavar="FILE", help="Write that as a page (.html).", show_default=False),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    prompt = _read(prompt)
    check_recursions(recursions, residual_scale, anderson)
    shows = show_depth or depth_page is not None
    _refuse_unlike(exit_policy, {"--threshold": threshold, "--vocabulary": vocabulary}, plot, speculate, shows=shows)

    from .generation import Generation
    from .models import load_model, require_recursive_model, with_recursions

    loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    loaded = with_recursions(loaded, model, recursions, residual_scale, anderson)
    if exit_policy is not None or speculate or shows:
        require_recursive_model(loaded, model)
    exits = None
    if exit_policy is not None:
        exits = _exit_settings(loaded.config, exit_policy, threshold, vocabulary, kv, min_depth, max_pending)
    inputs = _encode(tokenizer, prompt, chat=chat).to(loaded.device)
    arguments: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
    if temperature > 0:
        arguments |= {"temperature": temperature, "top_p": top_p}
    generation = Generation(loaded, tokenizer, inputs, arguments, seed=seed, exits=exits, speculate=speculate)
    generation.run(warm=stats)
    facts = {"prompt": prompt, **generation.facts(beside_plain=stats)}
    if exits is not None and (stats or plot is not None):
        facts |= _exit_facts(generation, agreement=stats and temperature == 0, plot=plot)
    shown, view, depths = "" if chat else prompt.rstrip("\n"), None, generation.depths()
    if depths is not None:
        pieces = token_pieces(tokenizer, generation.new.tolist())
        view = DepthView(shown, pieces, depths, loaded.config.num_recursions)
        facts |= {"tokens": pieces, "depths": depths}
    if view is not None and depth_page is not None:
        view.write_page(depth_page)
        talk.print(f"wrote the depths of tokens to {depth_page}", markup=False)
    if json:
        print_json(facts)
        return
    if view is not None and show_depth:
        print_styled(view.for_terminal())
    else:
        print_data(shown + facts["text"])
    if stats:
        talk.print(_stats(facts, exit_policy))


def _read(prompt: str | None) -> str:
    """The prompt, from standard input if it is None."""
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read()
    if not prompt.strip():
        raise typer.BadParameter("give a prompt as an argument or on standard input", param_hint="PROMPT")
    return prompt


def _refuse_unlike(
    exit_policy: str | None, of_policies: dict[str, Any], plot: Path | None, speculate: bool, *, shows: bool
) -> None:
    """Raises:
    typer.BadParameter: Options that exclude or lack one another.
    """
    if speculate and exit_policy is not None:
        raise typer.BadParameter("--exit is lossy and --speculate is not: give one of them", param_hint="--speculate")
    if plot is not None and exit_policy is None:
        raise typer.BadParameter("it draws exits, and without --exit there are none", param_hint="--plot")
    for option, value in of_policies.items():
        if value is not None and exit_policy is None:
            raise typer.BadParameter("it is for an exit policy, and without --exit there is none", param_hint=option)
    if speculate and shows:
        raise typer.BadParameter("--speculate has the whole model check every token", param_hint="--show-depth")


def _exit_settings(
    config: Any,
    policy: str,
    threshold: float | None,
    vocabulary: int | None,
    kv: str | None,
    min_depth: int,
    max_pending: int,
) -> Any:
    """Raises:
    SettingsError: An unknown policy or mode, or a threshold outside its range.
    """
    from recursify.modeling import ExitSettings, make_policy

    try:
        chosen = make_policy(policy, threshold, config, vocabulary=vocabulary)
        return ExitSettings(chosen, kv=kv or config.exit_kv, min_depth=min_depth, max_pending=max_pending)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _exit_facts(generation: Any, *, agreement: bool, plot: Path | None) -> dict[str, Any]:
    from recursify.evaluation.exits import draw_histogram, exit_statistics

    model, settings = generation.model, generation.exits
    num_exits = len(settings.layers or model.config.exit_depths)
    mask = generation.inputs["attention_mask"]
    statistics = exit_statistics(model, generation.output, mask, num_exits, agreement=agreement)
    if plot is not None:
        draw_histogram(statistics, plot)
    return {"exits": {**statistics.to_dict(), "simulated": settings.policy.simulated}}


def _stats(facts: dict[str, Any], policy: str | None) -> str:
    """The figures of a generation, for a person."""
    lines = [f"{facts['num_tokens']} tokens in {facts['seconds']:.2f} s, {facts['tokens_per_second']} tokens/s"]
    if "tokens_per_second_at_full_depth" in facts:
        lines[0] += f"; {facts['tokens_per_second_at_full_depth']} at full depth"
    if "drafted" in facts:
        lines.append(f"drafts     {facts['accepted']} of {facts['drafted']} were kept")
    if policy is None and "depths" in facts:
        lines.append(f"recursions {1 + sum(facts['depths']) / max(len(facts['depths']), 1):.2f} per token")
    if "exits" in facts:
        exits = facts["exits"]
        *early, whole = exits["histogram"]
        left = ", ".join(f"{count} after depth {depth}" for depth, count in enumerate(early))
        lines.append(f"exits      {left}; {whole} ran all layers")
        lines.append(
            f"layers     {exits['mean_layers']:.1f} of {exits['num_layers']} per token, in {exits['block_calls']} calls"
        )
        if exits["agreement"] is not None:
            lines.append(f"agreement  {exits['agreement']:.1%} of tokens are the whole model's first choice")
        if exits["simulated"]:
            lines.append(f"simulated  policy '{policy}' runs all layers to know when it could have stopped")
    return "\n".join(lines)


def _encode(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    """Token ids and mask of the prompt.

    Raises:
        SettingsError: A chat was asked for, and the model has no template.
    """
    if not chat:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise SettingsError("The model has no chat template, so --chat cannot be used. Leave it out to continue text.")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
