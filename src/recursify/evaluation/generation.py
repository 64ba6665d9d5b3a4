"""``generate_text``: the continuation of one prompt, timed, with the depth of every token."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recursify.checkpoint.loading import load_model, require_recursive_model
from recursify.errors import SettingsError
from recursify.modeling import CACHE_ARGUMENT, ExitSettings, RoutedCache

from .exits import ExitStatistics, draw_histogram, exit_statistics

UNREADABLE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class GenerationResult:
    """Continuation of a prompt.

    Attributes:
        prompt: Text of the prompt.
        text: Generated text.
        tokens: Text that each new token adds; empty before the last token of a character that takes several.
        depths: Last recursion of each new token, -1 where none ran; None for dense models and with ``speculate``.
        num_depths: Number of recursions of the model.
        seconds: Seconds that the generation took.
        plain_speed: Tokens per second of plain decoding; None if it was not measured.
        drafted: Number of drafted tokens, with ``speculate``.
        accepted: Number of accepted drafts, with ``speculate``.
        exits: Statistics of early exits, with an exit policy.
        simulated: True if the exit policy is a simulation.
    """

    prompt: str
    text: str
    tokens: list[str]
    depths: list[int] | None
    num_depths: int
    seconds: float
    plain_speed: float | None = None
    drafted: int | None = None
    accepted: int | None = None
    exits: ExitStatistics | None = None
    simulated: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of new tokens."""
        return len(self.tokens)

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        facts: dict[str, Any] = {
            "prompt": self.prompt,
            "text": self.text,
            "num_tokens": self.num_tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.speed, 2),
        }
        if self.drafted is not None:
            facts |= {"drafted": self.drafted, "accepted": self.accepted}
        if self.plain_speed is not None:
            facts["tokens_per_second_at_full_depth"] = round(self.plain_speed, 2)
        if self.exits is not None:
            facts["exits"] = {**self.exits.to_dict(), "simulated": self.simulated}
        if self.depths is not None:
            facts |= {"tokens": self.tokens, "depths": self.depths}
        return facts

    def plot(self, file: str | Path) -> None:
        """Draw the number of tokens per exit.

        Raises:
            SettingsError: No exit policy was used, matplotlib is not installed, or the file type is not supported.
            OutputError: The file cannot be written.
        """
        if self.exits is None:
            raise SettingsError("There are no exits to draw. Generate with an exit policy.")
        draw_histogram(self.exits, Path(file))


def generate_text(
    model: str | Path,
    prompt: str,
    *,
    chat: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    exit_policy: str | None = None,
    threshold: float | None = None,
    vocabulary: int | None = None,
    kv: str | None = None,
    min_depth: int = 0,
    max_pending: int = 64,
    speculate: bool = False,
    recursions: int | None = None,
    residual_scale: float | None = None,
    anderson: int = 0,
    measure: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> GenerationResult:
    """Continue one prompt; :meth:`RecursiveForCausalLM.generate` and :class:`Engine` are for programs.

    Args:
        model: Folder, ``.gguf`` file or Hub id of a recursive or dense model.
        prompt: Text to continue.
        chat: Apply the model's chat template to the prompt.
        max_new_tokens: Maximum number of new tokens.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Nucleus probability for sampling.
        seed: Seed for sampling.
        exit_policy: Name of an exit policy; None runs all recursions.
        threshold: Confidence above which tokens exit; None takes the calibrated one, else the policy's.
        vocabulary: Number of vocabulary entries that the policy scores; None takes the calibrated number.
        kv: KV cache of skipped depths: ``deferred``, ``copied`` or ``latest``; None takes the model's own.
        min_depth: First depth after which tokens may exit.
        max_pending: Maximum number of tokens that wait for their deferred depths.
        speculate: Draft with the first recursion and verify with the full model.
        recursions: Number of times to apply the shared block; None takes the model's own.
        residual_scale: Factor of each shared layer's update under other ``recursions``.
        anderson: Anderson acceleration depth under other ``recursions``.
        measure: Warm up first, and measure plain decoding and the agreement of exits, too.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's.
        device: Device to run on.
        trust_remote_code: Permission to run code from a dense model's folder.

    Raises:
        CheckpointError: The model does not load.
        SettingsError: The options exclude one another, or the model does not support them.
    """
    if speculate and exit_policy is not None:
        raise SettingsError("Early exit changes the output and speculation does not. Give exit_policy or speculate.")
    own_number = {"recursions": recursions, "residual_scale": residual_scale, "anderson": anderson}
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, **own_number)
    if exit_policy is not None or speculate:
        require_recursive_model(loaded, model)
    inputs = _encode(tokenizer, prompt, chat=chat).to(loaded.device)
    arguments: dict[str, Any] = {**inputs, "max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        arguments |= {"temperature": temperature, "top_p": top_p}
    cache = RoutedCache(loaded.config) if getattr(loaded.config, "router", None) is not None else None
    shortcut: dict[str, Any] = {} if cache is None else {CACHE_ARGUMENT: cache}
    try:
        exits = ExitSettings.from_options(
            exit_policy,
            threshold=threshold,
            vocabulary=vocabulary,
            kv=kv,
            config=loaded.config,
            min_depth=min_depth,
            max_pending=max_pending,
        )
        if exits is not None:
            shortcut["exit_policy"] = exits
        if speculate:
            shortcut["speculate"] = True
        has_shortcut = exits is not None or speculate
        if measure and has_shortcut:
            loaded.generate(**{**arguments, "max_new_tokens": 2})
        output, seconds = _timed(loaded, seed, arguments | shortcut)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    prompt_length = inputs["input_ids"].shape[1]
    new = output.sequences[0, prompt_length:]
    result: dict[str, Any] = {}
    if speculate:
        result |= {"drafted": int(output.drafted[0]), "accepted": int(output.accepted[0])}
    if measure and has_shortcut:
        plain, plain_seconds = _timed(loaded, seed, arguments)
        result["plain_speed"] = (plain.sequences.shape[1] - prompt_length) / plain_seconds
    if exits is not None:
        num_exits = len(exits.layers or loaded.config.exit_depths)
        greedy = measure and temperature == 0
        result["exits"] = exit_statistics(loaded, output, inputs["attention_mask"], num_exits, agreement=greedy)
        result["simulated"] = exits.policy.simulated
    return GenerationResult(
        prompt=prompt,
        text=tokenizer.decode(new, skip_special_tokens=True),
        tokens=token_pieces(tokenizer, new.tolist()),
        depths=None if speculate else _depths(loaded.config, output, cache, prompt_length, len(new)),
        num_depths=getattr(loaded.config, "num_recursions", 1),
        seconds=seconds,
        **result,
    )


def token_pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """Text that each token adds to those before it; joined, they are the whole text."""
    pieces, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # An incomplete character decodes to a replacement character until its last token follows.
        whole = text if end == len(ids) else text.rstrip(UNREADABLE)
        pieces.append(whole[len(shown) :])
        shown = whole if len(whole) > len(shown) else shown
    return pieces


def _encode(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    """Token ids and attention mask of the prompt.

    Raises:
        SettingsError: ``chat``, and the model has no chat template.
    """
    if not chat:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise SettingsError("The model has no chat template, so --chat cannot be used. Leave it out to continue text.")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _timed(model: Any, seed: int, arguments: dict[str, Any]) -> tuple[Any, float]:
    torch.manual_seed(seed)
    started = time.perf_counter()
    output = model.generate(**arguments, return_dict_in_generate=True)
    return output, time.perf_counter() - started


def _depths(config: Any, output: Any, cache: RoutedCache | None, prompt_length: int, count: int) -> list[int] | None:
    """Last recursion of each new token; None for a dense model."""
    if config.model_type != "recursive":
        return None
    if cache is not None:
        return cache.depths[0, prompt_length - 1 : prompt_length - 1 + count].tolist()
    if getattr(output, "exit_depths", None) is not None:
        return output.exit_depths[0].tolist()
    return [config.num_recursions - 1 if config.exit_depth is None else config.exit_depth] * count
