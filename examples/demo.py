"""The demo: make SmolLM2-135M recursive, heal it a little, and put it beside the dense model and the published way.

Run it with ``make demo``. It needs no GPU, no account and no network once its packages are there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from recursify.checkpoint.dense_checkpoint import load_tokenizer, open_checkpoint
from recursify.cli.report import format_table, print_data, progress_report, talk
from recursify.convert.pipeline import convert_model
from recursify.evaluation.perplexity import compare
from recursify.evaluation.text import default_text, token_windows
from recursify.modeling import RecursiveForCausalLM
from recursify.uptrain.run import uptrain_model
from recursify.uptrain.settings import UptrainSettings

MODEL = "smollm2-135m"
LAYOUT = {"num_recursions": 2, "num_prelude_layers": 4, "num_coda_layers": 4, "lora_rank": 64}
CALIBRATION_TOKENS = 8192
"""Half of what ``recursify convert`` takes, for half of its time."""
ROWS = {
    "published (average + SVD)": {"initialization": "average", "relaxation": "svd"},
    "calibrated": {"initialization": "calibrated", "relaxation": "calibrated"},
}
UPTRAINING = UptrainSettings(max_tokens=8192, length=256, batch_size=1, eval_sequences=4)
"""A minute and a half of distillation from the dense model; a user would take a thousand times as many tokens."""
PROMPT = "The three primary colors are"
NUM_WINDOWS = 12
WINDOW = 512
NEW_TOKENS = 32


@dataclass(frozen=True)
class Row:
    """One line of the table, and what the model wrote."""

    name: str
    cells: list[str]
    text: str


def measure(name: str, model: PreTrainedModel, dense: PreTrainedModel, tokenizer, windows: torch.Tensor) -> Row:
    """Size, held-out perplexity, agreement with the dense model, and tokens per second of greedy decoding."""
    comparison = compare(model, dense, windows)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    started = time.perf_counter()
    written = model.generate(**prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)[0]
    seconds = time.perf_counter() - started
    parameters = list(model.parameters())
    cells = [
        f"{sum(p.numel() for p in parameters) / 1e6:.1f}M",
        f"{sum(p.numel() * p.element_size() for p in parameters) / 1e6:.0f} MB",
        f"{comparison.model.perplexity:,.1f}",
        f"{comparison.top1_agreement:.1%}",
        f"{comparison.kl:.2f}",
        f"{NEW_TOKENS / seconds:.1f}",
    ]
    return Row(name, cells, tokenizer.decode(written, skip_special_tokens=True))


def main() -> None:
    """Convert twice, uptrain once, measure four models, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="keep the calibrated model here")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    started = time.perf_counter()
    checkpoint = open_checkpoint(MODEL)
    tokenizer, dense = load_tokenizer(checkpoint), checkpoint.load_model()
    text = default_text("held_out")
    windows = token_windows(tokenizer, text, WINDOW, max_tokens=NUM_WINDOWS * WINDOW)
    rows = [measure("dense", dense, dense, tokenizer, windows)]
    with tempfile.TemporaryDirectory() as scratch:
        for name, strategy in ROWS.items():
            settings = {**LAYOUT, "calibration_tokens": CALIBRATION_TOKENS, **strategy}
            keep = arguments.output if name == "calibrated" and arguments.output else Path(scratch) / name.split()[0]
            talk.print(f"\n{name}")
            with progress_report() as progress:
                convert_model(MODEL, keep, check=False, overwrite=True, progress=progress, **settings)
            model = RecursiveForCausalLM.from_pretrained(keep).eval()
            rows.append(measure(name, model, dense, tokenizer, windows))
        talk.print(f"\nuptrained: {UPTRAINING.max_tokens:,} tokens")
        healed = Path(scratch) / "uptrained"
        with progress_report() as progress:
            uptrain_model(keep, healed, settings=UPTRAINING, progress=progress)
        model = RecursiveForCausalLM.from_pretrained(healed).eval()
        rows.append(measure(f"uptrained, {UPTRAINING.max_tokens:,} tokens", model, dense, tokenizer, windows))
    for row in rows:
        print_data(f"\n[{row.name}] {row.text}")
    header = ["SmolLM2-135M", "parameters", "bytes", "perplexity", "same token", "KL", "tokens/s"]
    print_data("\n" + format_table(header, [[row.name, *row.cells] for row in rows]))
    print_data(
        f"\nHeld-out text: {text.name}, {windows.numel():,} tokens. {time.perf_counter() - started:.0f} s in all."
    )


if __name__ == "__main__":
    main()
