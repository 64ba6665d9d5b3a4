"""Predicted against measured perplexity of layouts of SmolLM2, and of those chosen for 0.82 and 0.7 of its size.

::

    python benchmarks/layout_search.py --output benchmarks/results/layout_search.csv

Every row is a conversion without training, calibrated on 4,096 tokens and measured on 8 held-out windows of 512. Rows
are written as they are done; rows that the output has are not measured again, and all predictions are made anew. The
constants of the prediction are fitted to the rows named in :data:`FITTED`; Spearman's rank correlation is that of the
others.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from recursify.checkpoint.dense_checkpoint import load_tokenizer, open_checkpoint
from recursify.convert.layout_plan import search_layouts
from recursify.convert.layout_search import LayoutSearch
from recursify.convert.pipeline import convert_model
from recursify.convert.settings import ConversionSettings
from recursify.evaluation.perplexity import compare
from recursify.evaluation.text import default_text, num_context, token_windows
from recursify.modeling import LayerLayout, RecursiveForCausalLM

MODEL = "smollm2-135m"
TOKENS = 4096
SIZES = (0.82, 0.7)
NUM_LAYERS = 30

LAYOUTS = {
    "cycle 4+22+4, rank 64": (4, 4, 2, "cycle", 64),
    "cycle 2+26+2, rank 82": (2, 2, 2, "cycle", 82),
    "cycle 0+30+0, rank 94": (0, 0, 2, "cycle", 94),
    "cycle 3+24+3, rank 9": (3, 3, 2, "cycle", 9),
    "cycle 0+30+0, rank 42": (0, 0, 2, "cycle", 42),
    "cycle 8+14+8, rank 0": (8, 8, 2, "cycle", 0),
    "3 cycles 3+24+3, rank 66": (3, 3, 3, "cycle", 66),
    "3 cycles 6+18+6, rank 100": (6, 6, 3, "cycle", 100),
    "neighbours 4+22+4, rank 64": (4, 4, 2, "sequence", 64),
    "neighbours 7+16+7, rank 25": (7, 7, 2, "sequence", 25),
    "neighbours 8+14+8, rank 0": (8, 8, 2, "sequence", 0),
    "3 neighbours 7+15+8, rank 73": (7, 8, 3, "sequence", 73),
    "3 neighbours 3+24+3, rank 66": (3, 3, 3, "sequence", 66),
    "3 neighbours 6+18+6, rank 12": (6, 6, 3, "sequence", 12),
    "4 neighbours 9+12+9, rank 63": (9, 9, 4, "sequence", 63),
    "4 neighbours 7+16+7, rank 13": (7, 7, 4, "sequence", 13),
}
"""Prelude, coda, recursions, order and rank, by name."""

FITTED = ("cycle 4+22+4, rank 64", "cycle 3+24+3, rank 9", "neighbours 7+16+7, rank 25", "3 cycles 3+24+3, rank 66")
COLUMNS = ("row", "settings", "size", "perplexity", "dense_perplexity", "kl", "cpu_seconds", "score", "predicted")


def layout_settings(row: tuple[int, int, int, str, int]) -> dict[str, Any]:
    """Settings of a conversion."""
    names = ("num_prelude_layers", "num_coda_layers", "num_recursions", "sharing", "lora_rank")
    return dict(zip(names, row, strict=True))


def score(search: LayoutSearch, settings: dict[str, Any]) -> float:
    """Predicted cost of a conversion with these settings, in nats per token."""
    prelude, coda = settings["num_prelude_layers"], settings["num_coda_layers"]
    layout = LayerLayout.fold(
        NUM_LAYERS,
        settings["num_recursions"],
        settings["sharing"],
        num_prelude_layers=prelude,
        num_coda_layers=coda,
    )
    pattern = settings.get("lora_rank_pattern") or dict.fromkeys(search.shapes, settings["lora_rank"])
    return search.predict(layout, pattern)


def measure(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Convert with these settings and measure the result beside the dense model."""
    checkpoint = open_checkpoint(MODEL)
    tokenizer = load_tokenizer(checkpoint)
    windows = token_windows(tokenizer, default_text("held_out"), 512)[:8]
    start = time.process_time()
    plan = convert_model(MODEL, folder, check=False, overwrite=True, calibration_tokens=TOKENS, **settings).plan
    seconds = time.process_time() - start
    model = RecursiveForCausalLM.from_pretrained(folder).eval()
    found = compare(model, checkpoint.load_model(), windows, num_context=num_context(tokenizer))
    return {
        "settings": json.dumps(settings),
        "size": round(plan.recursive.num_parameters / plan.dense.num_parameters, 4),
        "perplexity": round(found.model.perplexity, 3),
        "dense_perplexity": round(found.control.perplexity, 3),
        "kl": round(found.kl, 4),
        "cpu_seconds": round(seconds),
    }


def spearman(first: Iterable[float], second: Iterable[float]) -> float:
    """Rank correlation of two sequences of unlike values."""
    ranks = torch.stack([torch.tensor(list(each)).argsort().argsort().double() for each in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


def write(rows: dict[str, dict[str, Any]], output: Path) -> None:
    """Write the table."""
    with output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({"row": name, **row} for name, row in rows.items())


def main() -> None:
    """Measure the rows that are missing, predict all, and print the correlation."""
    parser = argparse.ArgumentParser(description="Compare predicted and measured perplexity of layouts.")
    parser.add_argument("--output", type=Path, required=True, help="CSV; rows in it are kept")
    parser.add_argument("--rows", type=int, default=None, help="measure at most this many rows")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if arguments.output.exists():
        with arguments.output.open(encoding="utf-8", newline="") as file:
            rows = {row.pop("row"): row for row in csv.DictReader(file)}
    settings = ConversionSettings(calibration_tokens=TOKENS)
    search = search_layouts(open_checkpoint(MODEL), settings, default_text("calibration"), lambda *_: None)
    wanted = {name: layout_settings(row) for name, row in LAYOUTS.items()}
    for size in SIZES:
        wanted[f"chosen for {size}"] = search.choose(int(size * search.num_parameters)).settings()
    missing = [name for name, options in wanted.items() if rows.get(name, {}).get("settings") != json.dumps(options)]
    with tempfile.TemporaryDirectory() as scratch:
        for name in missing[: arguments.rows]:
            rows[name] = measure(wanted[name], Path(scratch) / "model")
            print(f"{name}: {rows[name]['perplexity']}", file=sys.stderr)
            write(rows, arguments.output)
    for row in rows.values():
        row["score"] = score(search, json.loads(row["settings"]))
        row["predicted"] = round(search.perplexity(row["score"]), 2)
    write(rows, arguments.output)
    tested = [row for name, row in rows.items() if name not in FITTED]
    found = [math.log(float(row["perplexity"])) for row in tested]
    print(f"Spearman of {len(tested)} layouts: {spearman((row['score'] for row in tested), found):.3f}")


if __name__ == "__main__":
    main()
