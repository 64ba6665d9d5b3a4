"""Training callbacks: ``metrics.jsonl``, loss curves, progress reporting."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from recursify.progress import Progress

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"

PANELS = {
    "nats per token": r"(eval_)?(ce|kl)|eval_dense_ce",
    "top-1 agreement with the dense model": r"(eval_)?agreement",
    "nats per token, by exit": r"(eval_)?ce_depth_\d+",
    "fraction of tokens, by recursion": r"(eval_)?load_depth_\d+|(eval_)?dead_tokens",
    "agreement of threshold and top k": r"(eval_)?sampling_accuracy_depth_\d+",
    "top-1 agreement with the last recursion": r"(eval_)?(agreement|test_accuracy)_depth_\d+",
}
"""Mapping from the title of a plot to a pattern of the figures in it."""

logger = logging.getLogger(__name__)


class Watcher(TrainerCallback):
    """Callback that writes every log line to ``metrics.jsonl`` and reports the tokens done after every step."""

    def __init__(self, folder: Path, tokens_per_step: int, progress: Progress):
        self.file = folder / METRICS_FILE
        self.tokens_per_step = tokens_per_step
        self.progress = progress

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Remove lines that an interrupted run logged after the checkpoint that it is resumed from."""
        if state.is_world_process_zero:
            lines = read_metrics(self.file) if state.global_step else []
            valid = [line for line in lines if line["step"] <= state.global_step]
            # Beside the file first: a run killed while it rewrites the file would lose every line.
            scratch = self.file.with_name(f".{METRICS_FILE}")
            scratch.write_text("".join(json.dumps(line) + "\n" for line in valid), encoding="utf-8")
            scratch.replace(self.file)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        line = {"step": state.global_step, "tokens": state.global_step * self.tokens_per_step, **logs}
        line.pop("epoch", None)
        append_metrics(self.file, line)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            step, steps = state.global_step, state.max_steps
            self.progress("uptrain, tokens", step * self.tokens_per_step, steps * self.tokens_per_step)


def append_metrics(file: Path, line: dict[str, Any]) -> None:
    """Append a line to a ``metrics.jsonl``."""
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the lines of a ``metrics.jsonl``, up to one that was not written completely."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def draw_curves(folder: Path) -> Path | None:
    """Draw ``curves.png`` from ``metrics.jsonl``; without matplotlib, log a warning and return None."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("curves.png was not drawn: matplotlib is not installed. Run: pip install 'recursify[plot]'")
        return None
    lines = read_metrics(folder / METRICS_FILE)
    drawn = {
        name for line in lines for name, value in line.items() if isinstance(value, float) and math.isfinite(value)
    }
    panels = {title: sorted(name for name in drawn if re.fullmatch(names, name)) for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    figure = Figure(figsize=(7, 3.2 * len(panels)), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for name in names:
            points = [(line["tokens"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
            style = {"marker": "o", "markersize": 3} if name.startswith("eval_") else {"alpha": 0.6, "linewidth": 1}
            axes.plot(*zip(*points, strict=True), label=name, **style)
        axes.set_xlabel("tokens")
        axes.set_ylabel(title)
        axes.legend()
    figure.savefig(folder / CURVES_FILE, dpi=150)
    return folder / CURVES_FILE
