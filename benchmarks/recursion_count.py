"""Fewer or more recursions than a model was made with: what that costs, and when mixing the extra loops helps.

::

    python benchmarks/recursion_count.py MODEL --output benchmarks/results/recursion_count.csv

``MODEL`` is a recursive model, best one that was healed. Every row runs it another number of times, with its layers'
steps as they are or scaled by its own number over the row's (2310.12818), and with so many earlier loops mixed into one
that repeats them; beside it the dense model on the same tokens. How far a loop is from a fixed point is how much the
last one still changes its input, ``‖Block(h) - h‖ / ‖h‖``, mean over tokens.

The synthetic blocks are ``x -> tanh(A x + b)``, which contract at least at the rate ``‖A‖``: in ``real`` the
eigenvalues of ``A`` go from 0 to the rate, in ``rotation`` all lie on a circle of that radius. They say what mixing
does where there is a fixed point to go to.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keyed_results import KeyedResults, markdown_table, short
from quality import MODEL, WINDOW, commit
from recursify.checkpoint.dense_checkpoint import load_tokenizer, open_checkpoint
from recursify.cli.report import talk
from recursify.evaluation.perplexity import perplexity
from recursify.evaluation.text import default_text, token_windows
from recursify.modeling import RecursiveForCausalLM
from recursify.modeling.modeling_recursive_anderson import anderson_mix

COLUMNS = (
    "block",
    "recursions",
    "layers",
    "residual_scale",
    "anderson",
    "perplexity",
    "last_change",
    "loops",
    "error_after_8",
    "commit",
    "date",
)
COUNTS = (1, 2, 3, 4, 8)
HISTORIES = (0, 2, 4)
RATES = (0.5, 0.9, 0.99)
WIDTH = 64
MAX_LOOPS = 2000
NEAR = 1e-3
"""Relative distance from the fixed point at which a synthetic block has converged."""
MEASURED, DENSE = "the model's", "dense"


def variants(own: int) -> list[tuple[int, float, int]]:
    """Number of recursions, scale, history: of a model of ``own`` recursions, each way that differs."""
    chosen = []
    for count in COUNTS:
        chosen += [(count, scale, 0) for scale in dict.fromkeys((1.0, own / count))]
        earlier = -(-count // own) - 1
        longer = [history for history, before in zip(HISTORIES[1:], HISTORIES, strict=False) if earlier > before]
        chosen += [(count, 1.0, history) for history in longer]
    return chosen


class LastLoop:
    """Remembers how much the last loop of a forward changed its input."""

    def __init__(self, model: RecursiveForCausalLM):
        block = model.model.block
        first = block[-1] if model.config.sharing == "sequence" else block[0]
        self.entered = self.left = torch.empty(0)
        first.register_forward_pre_hook(self._enter)
        block[-1].register_forward_hook(self._leave)

    def _enter(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.entered = arguments[0]

    def _leave(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.left = output

    def change(self) -> float:
        """``‖Block(h) - h‖ / ‖h‖``, mean over tokens."""
        return float(((self.left - self.entered).norm(dim=-1) / self.entered.norm(dim=-1)).mean())


def run_model(model: RecursiveForCausalLM, windows: Tensor, variant: tuple[int, float, int]) -> dict[str, Any]:
    """Perplexity over ``windows`` of the model's own block, and the change in the last batch of them."""
    count, scale, history = variant
    other = model.with_recursions(count, residual_scale=scale, anderson=history)
    last = LastLoop(other)
    return {
        "block": MEASURED,
        "recursions": count,
        "layers": other.config.num_hidden_layers,
        "residual_scale": f"{scale:.4g}",
        "anderson": history,
        "perplexity": f"{perplexity(other, windows).perplexity:.6g}",
        "last_change": f"{last.change():.4f}",
    }


def synthetic_block(kind: str, rate: float) -> tuple[Tensor, Tensor]:
    """``A`` and ``b`` of ``x -> tanh(A x + b)``, ``[D, D]`` and ``[D]`` in float64, ``‖A‖ = rate``."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))[0]
    matrix = basis * rate
    if kind == "real":
        matrix = (basis * torch.linspace(0, rate, WIDTH, dtype=torch.float64)) @ basis.T
    return matrix, 0.3 * torch.randn(WIDTH, generator=generator, dtype=torch.float64)


def run_synthetic(kind: str, rate: float, history: int) -> dict[str, Any]:
    """Loops until 16 tokens are near the fixed point, in float32; and how far they are after eight."""
    matrix, offset = synthetic_block(kind, rate)
    fixed = torch.zeros(WIDTH, dtype=torch.float64)
    for _ in range(20 * MAX_LOOPS):
        fixed = torch.tanh(matrix @ fixed + offset)
    matrix, offset, fixed = matrix.float(), offset.float(), fixed.float()
    states = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1))
    entered: list[Tensor] = []
    left: list[Tensor] = []
    errors: list[float] = []
    while len(errors) < 8 or (errors[-1] > NEAR and len(errors) < MAX_LOOPS):
        entered = [*entered, states][-history - 1 :]
        left = [*left, torch.tanh(states @ matrix.T + offset)][-history - 1 :]
        states = anderson_mix(entered, left)
        errors.append(float((states - fixed).norm(dim=-1).max() / fixed.norm()))
    near = next((loop + 1 for loop, error in enumerate(errors) if error <= NEAR), f"over {MAX_LOOPS}")
    return {
        "block": f"{kind}, rate {rate:g}",
        "anderson": history,
        "loops": near,
        "error_after_8": f"{errors[7]:.3g}",
    }


def row_key(figures: dict[str, Any]) -> tuple[Any, ...]:
    """The dense model, the model's own block, then synthetic ones. CSV has strings for numbers."""
    place = [DENSE, MEASURED].index(figures["block"]) if figures["block"] in (DENSE, MEASURED) else 2
    numbers = [float(figures.get(name) or 0) for name in ("recursions", "anderson", "residual_scale")]
    return (place, figures["block"], *numbers)


def write_report(setup: dict[str, Any], output: Path, rows: dict[Any, dict[str, Any]]) -> str:
    """Both tables, with what a reader must know of them."""
    own: list[list[str]] = []
    synthetic: dict[str, list[str]] = {}
    for row in rows.values():
        if row["block"] == DENSE:
            own.append(["control: the dense model", str(row["layers"]), "–", "–", "–", short(row["perplexity"])])
        elif row["block"] == MEASURED:
            change = f"{float(row['last_change']):.3f}"
            own.append(
                [
                    f"{row['recursions']} recursions",
                    str(row["layers"]),
                    str(row["residual_scale"]),
                    str(row["anderson"]),
                    change,
                    short(row["perplexity"]),
                ]
            )
        else:
            synthetic.setdefault(row["block"], []).append(f"{row['loops']} ({row['error_after_8']})")
    head = ["", "layers run", "scale of steps", "earlier loops mixed", "change in the last loop", "perplexity"]
    histories = [f"{history} mixed" for history in HISTORIES]
    return (
        f"# Fewer or more recursions\n\nMade by `python benchmarks/recursion_count.py`; figures in `{output.name}`, "
        f"settings and versions in `{output.with_suffix('.json').name}`.\n\n{setup['model_is']}, made and trained with "
        f"{setup['recursions']} recursions. Perplexity on {setup['held_out_tokens']:,} tokens of "
        f"{setup['held_out_text']}; change is the mean of ‖Block(h) − h‖ / ‖h‖ over tokens of the last "
        f"batch.\n\n{markdown_table(head, own)}\n\n## Blocks that converge by construction\n\n"
        f"`x → tanh(A x + b)` of width {WIDTH}, contracting at least at the rate ‖A‖: loops until the worst of 16 "
        f"tokens is within {NEAR:g} of the fixed point, and in brackets how far it is after eight.\n\n"
        f"{markdown_table(['eigenvalues of A', *histories], [[name, *cells] for name, cells in synthetic.items()])}\n"
    )


def setup_of(arguments: argparse.Namespace, own: int, windows: Tensor, text: str) -> dict[str, Any]:
    """What all rows have in common."""
    made = (arguments.model / "recursify.json").read_bytes()
    return {
        "model_is": arguments.model_is,
        "model_record": hashlib.sha256(made).hexdigest()[:16],
        "recursions": own,
        "held_out_text": text,
        "held_out_tokens": windows.numel(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "recursify")},
        },
    }


def main() -> None:
    """Measure the dense model, the model at every number of recursions, and synthetic blocks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--model-is", default="A recursive model", help="what MODEL is, for the report")
    parser.add_argument("--dense", default=MODEL, help="the dense model that it was made from")
    parser.add_argument("--windows", type=int, default=8, help=f"held-out windows of {WINDOW} tokens")
    parser.add_argument("--output", type=Path, required=True, help="CSV; rows that are in it are not measured again")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.dense)
    text = default_text("held_out")
    windows = token_windows(load_tokenizer(checkpoint), text, WINDOW, max_tokens=arguments.windows * WINDOW)
    model = RecursiveForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    setup = setup_of(arguments, model.config.num_recursions, windows, text.name)
    report = partial(write_report, setup, arguments.output)
    results = KeyedResults(arguments.output, COLUMNS, row_key, setup, report)

    def add(figures: dict[str, Any]) -> None:
        figures = {**figures, "commit": commit(), "date": datetime.now(UTC).date().isoformat()}
        results.add(figures)
        talk.print(", ".join(f"{key} {figures[key]}" for key in COLUMNS if key in figures))

    for kind in ("real", "rotation"):
        for rate in RATES:
            for history in HISTORIES:
                add(run_synthetic(kind, rate, history))
    if not any(row["block"] == DENSE for row in results.rows.values()):
        dense = checkpoint.load_model(torch.float32)
        figure = f"{perplexity(dense, windows).perplexity:.6g}"
        add({"block": DENSE, "layers": dense.config.num_hidden_layers, "perplexity": figure})
    for count, scale, history in variants(model.config.num_recursions):
        key = {"block": MEASURED, "recursions": count, "residual_scale": f"{scale:.4g}", "anderson": history}
        if row_key(key) not in results.rows:
            add(run_model(model, windows, (count, scale, history)))


if __name__ == "__main__":
    main()
