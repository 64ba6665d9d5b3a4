"""What exits learn: how often the first recursion says what the last one says, and what that costs the last one.

::

    python benchmarks/exits.py MODEL --tokens 15000 --output benchmarks/results/exits.csv

``MODEL`` is a recursive model, best one that was healed. Every row trains it anew with other exits or another loss, on
the same tokens in the same order; ``no-exits`` is the same training without any, the control of the last recursion.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import tempfile
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from keyed_results import KeyedResults, markdown_table, short
from quality import MODEL, commit
from recursify.cli.report import talk
from recursify.evaluation.text import Text, default_text
from recursify.uptrain.run import uptrain_model
from recursify.uptrain.settings import UptrainSettings

COLUMNS = (
    "row",
    "last_perplexity_before",
    "last_perplexity",
    "exit_perplexity_before",
    "exit_perplexity",
    "exit_agreement_before",
    "exit_agreement",
    "test_accuracy",
    "tokens",
    "commit",
    "date",
)

ROWS: dict[str, dict[str, Any]] = {
    "no-exits": {"stage": "heal"},
    "shared": {},
    "shared, no coda": {"exit_through_coda": False},
    "shared, no KD": {"exit_kl_weight": 0.0},
    "shared, weighted": {"exit_loss": "weighted"},
    "shared, FREE": {"exit_loss": "free"},
    "norm": {"exit_head": "norm"},
    "low_rank": {"exit_head": "low_rank"},
    "low_rank, no coda": {"exit_head": "low_rank", "exit_through_coda": False},
    "low_rank, frozen base": {"exit_head": "low_rank", "trainable": "heads"},
    "full, frozen base": {"exit_head": "full", "trainable": "heads"},
}
"""Name -> settings; unless one says otherwise the loss is aggressive with KD, and exits run the coda."""

HELD_OUT_SEQUENCES = 24


def write_texts(text: Text, folder: Path) -> str:
    """The documents of ``text`` as files in ``folder``."""
    folder.mkdir()
    for index, document in enumerate(text.documents):
        (folder / f"{index:03}.txt").write_text(document, encoding="utf-8")
    return str(folder)


def run_row(name: str, model: Path, scratch: Path, settings: UptrainSettings) -> dict[str, Any]:
    """Train one row; figures are on held-out text, before and after."""
    chosen = UptrainSettings.from_mapping({**settings.to_dict(), **ROWS[name]}, "the benchmark")

    def progress(stage: str, done: int, total: int) -> None:
        if done % 5120 == 0:
            talk.print(f"{name}: {stage} {done}/{total}")

    outcome = uptrain_model(model, scratch / "out", settings=chosen, overwrite=True, progress=progress)
    before, after = outcome.before, outcome.after
    return {
        "row": name,
        "last_perplexity_before": f"{before['perplexity']:.5g}",
        "last_perplexity": f"{after['perplexity']:.5g}",
        "exit_perplexity_before": f"{before['perplexity_depth_0']:.5g}",
        "exit_perplexity": f"{after['perplexity_depth_0']:.5g}",
        "exit_agreement_before": round(before["agreement_depth_0"], 4),
        "exit_agreement": round(after["agreement_depth_0"], 4),
        "test_accuracy": round(after["test_accuracy_depth_0"], 4) if "test_accuracy_depth_0" in after else "",
        "tokens": outcome.tokens,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def write_report(setup: dict[str, Any], output: Path, rows: dict[Any, dict[str, Any]]) -> str:
    """The table with what a reader must know of it."""
    lines = [
        [
            row["row"],
            f"{short(row['last_perplexity_before'])} → {short(row['last_perplexity'])}",
            f"{short(row['exit_perplexity_before'])} → {short(row['exit_perplexity'])}",
            f"{float(row['exit_agreement_before']):.1%} → {float(row['exit_agreement']):.1%}",
            f"{float(row['test_accuracy']):.1%}" if row["test_accuracy"] != "" else "–",
        ]
        for row in rows.values()
    ]
    head = ["", "perplexity, last recursion", "perplexity, exit", "exit says what the last says", "test is right"]
    return (
        f"# What exits learn\n\nMade by `python benchmarks/exits.py`; figures in `{output.name}`, settings and "
        f"versions in `{output.with_suffix('.json').name}`.\n\n{setup['model_is']}. {setup['tokens']:,} tokens of "
        f"{setup['training_text']}, with the dense model as teacher; measured on {setup['held_out_text']}, packed. "
        f"Before → after. `no-exits` is the same training without exits; a model without heads is read out with its "
        f"own.\n\n{markdown_table(head, lines)}\n"
    )


def main() -> None:
    """Train and measure the chosen rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--model-is", default="A recursive model", help="what MODEL is, for the report")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--tokens", type=int, default=15_000)
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--output", type=Path, required=True, help="CSV; other rows in it are kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        texts = default_text("calibration"), default_text("held_out")
        settings = UptrainSettings(
            stage="exits",
            data=(write_texts(texts[0], folder / "train"),),
            eval_data=(write_texts(texts[1], folder / "held-out"),),
            eval_sequences=HELD_OUT_SEQUENCES,
            teacher=MODEL,
            max_tokens=arguments.tokens,
            eval_every=10**6,
            save_every=10**6,
            length=256,
            batch_size=1,
            precision=arguments.precision,
        )
        own = ("data", "eval_data")
        made = (arguments.model / "recursify.json").read_bytes()
        setup = {
            "model_is": arguments.model_is,
            "model_record": hashlib.sha256(made).hexdigest()[:16],
            "tokens": arguments.tokens,
            "training_text": texts[0].name,
            "held_out_text": f"{HELD_OUT_SEQUENCES} sequences of {texts[1].name}",
            "settings": {key: value for key, value in settings.to_dict().items() if key not in own},
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "accelerate", "recursify")},
            },
        }
        results = KeyedResults(
            arguments.output,
            COLUMNS,
            lambda row: (list(ROWS).index(row["row"]),),
            setup,
            partial(write_report, setup, arguments.output),
        )
        for name in arguments.rows:
            results.add(run_row(name, arguments.model, folder, settings))
    print(arguments.output.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
