"""``recursify generate``."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from .options import DeviceOption, DtypeOption, JsonOption, ModelArgument, TrustOption
from .report import print_data, print_json, talk

EXAMPLES = """
Continue a prompt with a recursive (or dense) model. The prompt is an argument, or standard input.

**Examples**

`recursify generate smollm2-r2 "Once upon a time"`

`recursify generate smollm2-r2 "What is a recursion?" --chat --max-new-tokens 80`

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
    stats: Annotated[bool, typer.Option("--stats", help="Report tokens per second on stderr.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read()
    if not prompt.strip():
        raise typer.BadParameter("give a prompt as an argument or on standard input", param_hint="PROMPT")
    import torch

    from .models import load_model

    loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    inputs = _encode(tokenizer, prompt, chat=chat).to(loaded.device)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    started = time.perf_counter()
    written = loaded.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)[0]
    seconds = time.perf_counter() - started
    new = written[inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    facts = {
        "prompt": prompt,
        "text": text,
        "num_tokens": len(new),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(len(new) / seconds, 2),
    }
    if json:
        print_json(facts)
        return
    print_data(text if chat else prompt.rstrip("\n") + text)
    if stats:
        talk.print(f"{facts['num_tokens']} tokens in {seconds:.2f} s, {facts['tokens_per_second']} tokens/s")


def _encode(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    """Token ids and mask of the prompt.

    Raises:
        SettingsError: A chat was asked for, and the model has no template.
    """
    if not chat:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    from recursify.errors import SettingsError

    if not tokenizer.chat_template:
        raise SettingsError("The model has no chat template, so --chat cannot be used. Leave it out to continue text.")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
