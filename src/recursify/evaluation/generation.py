"""``generate_text``: the continuation of one prompt, timed, with the depth of every token."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from recursify.chat_template import render_chat
from recursify.checkpoint.generation_defaults import GenerationDefaults
from recursify.checkpoint.loading import load_model, require_recursive_model
from recursify.checkpoint.vocabulary import require_known_tokens
from recursify.errors import SettingsError
from recursify.modeling import CACHE_ARGUMENT, ExitSettings, RoutedCache
from recursify.settings import resolve_settings

from .exits import ExitStatistics, exit_statistics
from .settings import GenerationSettings

NEW_TOKENS = 64
"""Maximum number of new tokens where neither the user nor the model sets it."""

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
            facts["exits"] = {**asdict(self.exits), "simulated": self.simulated}
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
        self.exits.plot(file)


def generate_text(
    model: str | Path,
    prompt: str,
    *,
    settings: GenerationSettings | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    **options: Any,
) -> GenerationResult:
    """Continue one prompt; :meth:`RecursiveForCausalLM.generate` and :class:`Engine` are for programs.

    Args:
        model: Folder, ``.gguf`` file or Hub id of a recursive or dense model.
        prompt: Text to continue.
        settings: Settings; give these or ``options``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's.
        device: Device to run on.
        trust_remote_code: Permission to run code from a dense model's folder.
        options: Fields of :class:`GenerationSettings`.

    Raises:
        CheckpointError: The model does not load.
        SettingsError: The settings are invalid, or the model does not support them.
    """
    settings = resolve_settings(GenerationSettings, settings, options)
    loaded, tokenizer = load_model(
        model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, **settings.loading
    )
    if settings.exit_policy is not None or settings.speculate:
        require_recursive_model(loaded, model)
    try:
        return _generate(loaded, tokenizer, prompt, settings)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _generate(model: Any, tokenizer: Any, prompt: str, settings: GenerationSettings) -> GenerationResult:
    inputs = _encode(tokenizer, prompt, chat=settings.chat).to(model.device)
    require_known_tokens(inputs["input_ids"][0].tolist(), model.config.vocab_size, tokenizer)
    arguments = {**inputs, **_sampling(model, settings)}
    options = {name: getattr(settings, name) for name in ("threshold", "vocabulary", "kv", "min_depth", "max_pending")}
    exits = ExitSettings.from_options(settings.exit_policy, config=model.config, **options)
    shortcut: dict[str, Any] = {} if exits is None else {"exit_policy": exits}
    if settings.speculate:
        shortcut["speculate"] = True
    if settings.measure and shortcut:
        model.generate(**{**arguments, "max_new_tokens": 2})
    cache = RoutedCache(model.config) if getattr(model.config, "router", None) is not None else None
    routed = {} if cache is None else {CACHE_ARGUMENT: cache}
    output, seconds = _timed(model, settings.seed, arguments | shortcut | routed)
    prompt_length = inputs["input_ids"].shape[1]
    new = output.sequences[0, prompt_length:]
    result: dict[str, Any] = {}
    if settings.speculate:
        result |= {"drafted": int(output.drafted[0]), "accepted": int(output.accepted[0])}
    if settings.measure and shortcut:
        plain, plain_seconds = _timed(model, settings.seed, arguments)
        result["plain_speed"] = (plain.sequences.shape[1] - prompt_length) / plain_seconds
    if exits is not None:
        num_exits = len(exits.layers or model.config.exit_depths)
        greedy = settings.measure and not arguments["do_sample"] and arguments["repetition_penalty"] == 1
        result["exits"] = exit_statistics(model, output, inputs["attention_mask"], num_exits, agreement=greedy)
        result["simulated"] = exits.policy.simulated
    return GenerationResult(
        prompt=prompt,
        text=tokenizer.decode(new, skip_special_tokens=True),
        tokens=token_pieces(tokenizer, new.tolist()),
        depths=None if settings.speculate else _depths(model.config, output, cache, prompt_length, len(new)),
        num_depths=getattr(model.config, "num_recursions", 1),
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
    """Token ids and attention mask of the prompt."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise SettingsError("The model has no chat template, so --chat cannot be used. Leave it out to continue text.")
    messages = [{"role": "user", "content": prompt}]
    return render_chat(tokenizer, messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _sampling(model: Any, settings: GenerationSettings) -> dict[str, Any]:
    """Arguments of ``generate`` from the settings and the defaults of ``model``, whose generation config keeps only its
    special tokens: transformers applies every other field of it, and ``top_k=50`` where it has none."""
    defaults, config = GenerationDefaults.of(model), model.generation_config
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**special)
    sampling = defaults.sampling(vars(settings))
    temperature, penalty = sampling.pop("temperature"), sampling.pop("repetition_penalty")
    arguments: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens or defaults.max_new_tokens or NEW_TOKENS,
        "do_sample": temperature > 0,
        "repetition_penalty": penalty,
    }
    return arguments if temperature == 0 else arguments | sampling | {"temperature": temperature}


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
        assert cache.depths is not None
        return cache.depths[0, prompt_length - 1 : prompt_length - 1 + count].tolist()
    if getattr(output, "exit_depths", None) is not None:
        return output.exit_depths[0].tolist()
    return [config.num_recursions - 1 if config.exit_depth is None else config.exit_depth] * count
