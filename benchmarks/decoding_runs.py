"""What the benchmarks of decoding have in common: prompts, models that stop at no token, times, and the setup."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from quality import MODEL
from recursify.evaluation.text import Text, text_start

PROMPT_LENGTHS = (16, 24, 32, 48, 64)
"""Tokens of the prompts, in turn."""


def openings(tokenizer: PreTrainedTokenizerBase, text: Text, count: int) -> list[Tensor]:
    """Ids ``[T]`` of ``count`` prompts: how documents begin, and, where those run out, how their second halves do.

    Raises:
        SystemExit: The text has too few that are long enough.
    """
    passages = [*text.documents, *(_second_half(document) for document in text.documents)]
    prompts: list[Tensor] = []
    for passage in passages:
        length = PROMPT_LENGTHS[len(prompts) % len(PROMPT_LENGTHS)]
        ids = tokenizer(passage, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [*text_start(tokenizer), *ids][:length]
        if len(ids) == length:
            prompts.append(torch.tensor(ids))
    if len(prompts) < count:
        raise SystemExit(f"{text.name} gives {len(prompts)} prompts, and {count} are asked for.")
    return prompts[:count]


def _second_half(document: str) -> str:
    """From the paragraph in the middle on."""
    paragraphs = document.split("\n\n")
    return "\n\n".join(paragraphs[len(paragraphs) // 2 :])


def pad_left(prompts: list[Tensor], pad: int) -> dict[str, Tensor]:
    """A batch ``[B, T]`` for ``generate``."""
    flipped = [prompt.flip(0) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(flipped, batch_first=True, padding_value=pad).flip(1)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def decode_greedily(model: PreTrainedModel, new_tokens: int, pad: int) -> None:
    """Have every ``generate`` of ``model`` make exactly ``new_tokens`` tokens, whatever they are."""
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=None, return_dict_in_generate=True
    )


@dataclass(frozen=True)
class Spent:
    """Seconds on the wall, and of the processor, which other processes of the machine disturb less."""

    wall: float
    cpu: float


def timed(run: Callable[[], Any]) -> tuple[Spent, Any]:
    """What it took, and what came of it."""
    wall, cpu = time.perf_counter(), time.process_time()
    outcome = run()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu), outcome


SPEED_COLUMNS = ("speed_ratio", "cpu_ratio", "slowest", "fastest", "tokens_per_second", "tokens_per_cpu_second")


def speed_figures(spent: list[Spent], control: list[Spent], new_tokens: int) -> dict[str, Any]:
    """Tokens per second over those of the control, on the wall and of the processor; and the latter at its extremes.

    Args:
        spent: Per prompt, or per batch of them.
        control: On the same prompts, in the same round.
        new_tokens: Made in all that time.
    """
    wall, cpu = sum(each.wall for each in spent), sum(each.cpu for each in spent)
    ratios = [theirs.cpu / mine.cpu for mine, theirs in zip(spent, control, strict=True)]
    return {
        "speed_ratio": round(sum(each.wall for each in control) / wall, 3),
        "cpu_ratio": round(sum(each.cpu for each in control) / cpu, 3),
        "slowest": round(min(ratios), 3),
        "fastest": round(max(ratios), 3),
        "tokens_per_second": round(new_tokens / wall, 2),
        "tokens_per_cpu_second": round(new_tokens / cpu, 2),
    }


def speed_cells(row: dict[str, Any]) -> list[str]:
    """Those figures in a report, under :data:`SPEED_HEAD`."""
    spread = f"({float(row['slowest']):.2f}–{float(row['fastest']):.2f})"
    return [f"{float(row['speed_ratio']):.2f}×", f"{float(row['cpu_ratio']):.2f}× {spread}"]


SPEED_HEAD = ["speed", "speed by CPU seconds"]
SPEED_NOTE = (
    "*Speed*: tokens per second over those of the control on the same prompts, in turns with it; by CPU seconds, which "
    "other processes of the machine disturb less, with the slowest and the fastest turn."
)


def common_setup(model: Path, model_is: str) -> dict[str, Any]:
    """What the figures of all rows have in common, whatever is measured."""
    made = (model / "recursify.json").read_bytes()
    return {
        "model_is": model_is,
        "model_record": hashlib.sha256(made).hexdigest()[:16],
        "dense": MODEL,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "recursify")},
        },
    }
