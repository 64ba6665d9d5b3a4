"""What early exits did in a generation: where tokens left, what that cost, and whether the whole model agrees."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recursify.modeling import ExitGenerateOutput

from .pictures import SHARED, new_figure, save_figure


@dataclass(frozen=True)
class ExitStatistics:
    """Of the new tokens of a generation with an exit policy, without the first, which is the prompt's.

    Attributes:
        histogram: How many tokens left by each exit, those that ran all layers last.
        num_tokens: How many there are.
        mean_layers: Layers run per token; a call that carries waiting tokens along counts once (FREE's block average).
        num_layers: Layers of the whole model.
        block_calls: How often a segment of layers was run, for all rows together.
        agreement: How often the token is the whole model's first choice after the same text; None if not asked for, or
            where tokens were sampled.
    """

    histogram: list[int]
    num_tokens: int
    mean_layers: float
    num_layers: int
    block_calls: int
    agreement: float | None

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return asdict(self)


def exit_statistics(
    model: PreTrainedModel, output: ExitGenerateOutput, attention_mask: Tensor, num_exits: int, *, agreement: bool
) -> ExitStatistics:
    """Count what ``output`` did.

    Args:
        model: That generated it.
        output: Of ``generate(exit_policy=…, return_dict_in_generate=True)``.
        attention_mask: ``[B, T]`` of the prompts.
        num_exits: Exits of the model; tokens that left by none have this number.
        agreement: Run the whole model over the text, once, and compare.
    """
    assert output.exit_depths is not None
    assert output.layers_run is not None
    assert output.block_calls is not None
    left = output.exit_depths[:, 1:]
    counted = left[left >= 0]
    num_tokens = counted.numel()
    return ExitStatistics(
        histogram=torch.bincount(counted, minlength=num_exits + 1).tolist(),
        num_tokens=num_tokens,
        mean_layers=float(output.layers_run.sum()) / max(num_tokens, 1),
        num_layers=int(model.config.num_hidden_layers),
        block_calls=output.block_calls,
        agreement=_agreement(model, output, attention_mask) if agreement and num_tokens else None,
    )


def draw_histogram(statistics: ExitStatistics, file: Path) -> None:
    """Draw by which exit tokens left, as the picture that the name of ``file`` asks for (png, svg, pdf).

    Raises:
        SettingsError: matplotlib is not installed, or draws no such files.
        OutputError: The file cannot be written.
    """
    *early, _ = statistics.histogram
    names = [*(f"depth {depth}" for depth in range(len(early))), "all layers"]
    figure = new_figure(1.2 * len(names) + 2, 3.2)
    axes = figure.subplots()
    bars = axes.bar(names, [count / max(statistics.num_tokens, 1) for count in statistics.histogram], color=SHARED)
    axes.bar_label(bars, [f"{count:,}" for count in statistics.histogram])
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("part of tokens")
    axes.set_title(f"{statistics.mean_layers:.1f} of {statistics.num_layers} layers per token", fontsize=10)
    save_figure(figure, file)


@torch.inference_mode()
def _agreement(model: PreTrainedModel, output: ExitGenerateOutput, attention_mask: Tensor) -> float:
    """Fraction of tokens that the whole model puts first after the text before them."""
    assert output.exit_depths is not None
    ids, left = output.sequences, output.exit_depths
    mask = torch.cat([attention_mask, torch.ones_like(left)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    new = slice(attention_mask.shape[1], -1)
    same = logits[:, new].argmax(-1) == ids[:, attention_mask.shape[1] + 1 :]
    return float(same[left[:, 1:] >= 0].float().mean())
