"""Statistics of early exits in a generation: exit depths, computed layers, agreement with the full model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recursify.modeling import ExitGenerateOutput
from recursify.pictures import SHARED, new_figure, save_figure


@dataclass(frozen=True)
class ExitStatistics:
    """Statistics of the new tokens of a generation, without the first, which the prefill computes at full depth.

    Attributes:
        histogram: Number of tokens per exit; the last entry counts tokens that ran all layers.
        num_tokens: Number of tokens.
        mean_layers: Layers run per token; a call that includes deferred tokens counts once (FREE's block average).
        num_layers: Number of layers of the full model.
        block_calls: Number of calls of a segment of layers, for the whole batch.
        agreement: Fraction of tokens that are the argmax of the full model after the same text; None if not computed.
    """

    histogram: list[int]
    num_tokens: int
    mean_layers: float
    num_layers: int
    block_calls: int
    agreement: float | None

    def plot(self, file: str | Path) -> None:
        """Draw the histogram of exit depths, in the format of the suffix of ``file`` (png, svg, pdf).

        Raises:
            SettingsError: matplotlib is not installed, or does not support the format.
            OutputError: The file cannot be written.
        """
        *early, _ = self.histogram
        names = [*(f"depth {depth}" for depth in range(len(early))), "all layers"]
        figure = new_figure(1.2 * len(names) + 2, 3.2)
        axes = figure.subplots()
        bars = axes.bar(names, [count / max(self.num_tokens, 1) for count in self.histogram], color=SHARED)
        axes.bar_label(bars, [f"{count:,}" for count in self.histogram])
        axes.set_ylim(0, 1.1)
        axes.set_ylabel("fraction of tokens")
        axes.set_title(f"{self.mean_layers:.1f} of {self.num_layers} layers per token", fontsize=10)
        save_figure(figure, file)


def exit_statistics(
    model: PreTrainedModel, output: ExitGenerateOutput, attention_mask: Tensor, num_exits: int, *, agreement: bool
) -> ExitStatistics:
    """Compute the statistics of a generation.

    Args:
        model: Recursive model that generated ``output``.
        output: Result of ``generate(exit_policy=…, return_dict_in_generate=True)``.
        attention_mask: Mask of the prompts, ``[B, T]``.
        num_exits: Number of exits; the exit depth of tokens that ran all layers.
        agreement: Run the full model once over the text, and compare.
    """
    assert output.exit_depths is not None
    assert output.layers_run is not None
    assert output.block_calls is not None
    depths = output.exit_depths[:, 1:]
    depths = depths[depths >= 0]  # -1 is padding
    num_tokens = depths.numel()
    return ExitStatistics(
        histogram=torch.bincount(depths, minlength=num_exits + 1).tolist(),
        num_tokens=num_tokens,
        mean_layers=float(output.layers_run.sum()) / max(num_tokens, 1),
        num_layers=int(model.config.num_hidden_layers),
        block_calls=output.block_calls,
        agreement=_agreement(model, output, attention_mask) if agreement and num_tokens else None,
    )


@torch.inference_mode()
def _agreement(model: PreTrainedModel, output: ExitGenerateOutput, attention_mask: Tensor) -> float:
    """Fraction of tokens that are the argmax of the full model after the text before them."""
    assert output.exit_depths is not None
    ids, depths = output.sequences, output.exit_depths
    mask = torch.cat([attention_mask, torch.ones_like(depths)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    new = slice(attention_mask.shape[1], -1)
    same = logits[:, new].argmax(-1) == ids[:, attention_mask.shape[1] + 1 :]
    return float(same[depths[:, 1:] >= 0].float().mean())
