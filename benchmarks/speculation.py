"""Whether speculation says what plain decoding says, how many drafts are kept, and what it does for speed.

::

    python benchmarks/speculation.py MODEL --output benchmarks/results/speculation.csv

``MODEL`` is a recursive model, best one with trained exits. Every row continues the same held-out prompts greedily. All
rows take their turn at a prompt (or a batch of them) before the next one, and speeds are those of a row over the
recursive model's plain decoding of the same prompts. ``early-exit`` is transformers' own self-speculation on the
unrolled dense export, which reads the layers before the boundary out with the model's norm and head and runs no coda;
``speculate-layers`` drafts by that same exit. transformers' takes one prompt at a time.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from decoding_runs import (
    PROMPT_LENGTHS,
    SPEED_COLUMNS,
    SPEED_HEAD,
    SPEED_NOTE,
    Spent,
    common_setup,
    decode_greedily,
    openings,
    pad_left,
    speed_cells,
    speed_figures,
    timed,
)
from keyed_results import KeyedResults, markdown_table
from quality import MODEL, commit
from recursify.checkpoint.dense_checkpoint import load_tokenizer, open_checkpoint
from recursify.cli.report import talk
from recursify.convert.export import export_model
from recursify.evaluation.text import default_text
from recursify.modeling import RecursiveForCausalLM, SpeculationSettings

COLUMNS = (
    "row",
    "batch",
    "prompts",
    "new_tokens",
    "equal_tokens",
    "differing_prompts",
    "largest_gap",
    "drafted",
    "acceptance",
    "tokens_per_round",
    *SPEED_COLUMNS,
    "commit",
    "date",
)

AT_BOUNDARY = "layers"
"""Stands for settings that draft after the layers before the first boundary, without the coda."""


@dataclass(frozen=True)
class Row:
    """One way to decode.

    Attributes:
        description: What it is, for a reader.
        model: ``recursive``, ``unrolled`` or ``dense``.
        speculate: As ``generate`` takes it, or :data:`AT_BOUNDARY`.
        early_exit: Whether it drafts in transformers' own way.
        batches: Of how many prompts.
        everywhere: Whether it runs on all prompts, or on the first of them.
    """

    description: str
    model: str = "recursive"
    speculate: Any = None
    early_exit: bool = False
    batches: tuple[int, ...] = (1, 4)
    everywhere: bool = False

    @property
    def plain(self) -> bool:
        """Whether the model decodes by itself."""
        return self.speculate is None and not self.early_exit


ROWS = {
    "plain": Row("recursive model, plain", everywhere=True),
    "speculate": Row("recursive model, speculating", speculate=True, everywhere=True),
    "speculate-2": Row("recursive model, 2 drafts always", speculate=SpeculationSettings(num_drafts=2, adaptive=False)),
    "speculate-4": Row("recursive model, 4 drafts always", speculate=SpeculationSettings(num_drafts=4, adaptive=False)),
    "speculate-layers": Row(
        "recursive model, speculating by an exit without the coda", speculate=AT_BOUNDARY, batches=(1,)
    ),
    "unrolled": Row("unrolled dense export, plain", "unrolled"),
    "early-exit": Row("unrolled dense export, `assistant_early_exit`", "unrolled", early_exit=True, batches=(1,)),
    "dense": Row("dense model, plain", "dense"),
}
CONTROLS = {"recursive": "plain", "unrolled": "unrolled", "dense": "dense"}
"""The plain row of each model."""


@dataclass
class Tally:
    """What a row did to the prompts so far; see :data:`COLUMNS`."""

    prompts: int = 0
    new_tokens: int = 0
    spent: list[Spent] = field(default_factory=list)
    control_spent: list[Spent] = field(default_factory=list)
    equal_tokens: int = 0
    differing_prompts: int = 0
    largest_gap: float = 0.0
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0

    def figures(self, name: str, batch: int) -> dict[str, Any]:
        """As a row of the CSV."""
        figures = {
            "row": name,
            "batch": batch,
            "prompts": self.prompts,
            "new_tokens": self.new_tokens,
            **speed_figures(self.spent, self.control_spent, self.new_tokens),
            "commit": commit(),
            "date": datetime.now(UTC).date().isoformat(),
        }
        if ROWS[name].plain:
            return figures
        return figures | {
            "equal_tokens": round(self.equal_tokens / self.new_tokens, 6),
            "differing_prompts": self.differing_prompts,
            "largest_gap": f"{self.largest_gap:.3g}",
            "drafted": self.drafted,
            "acceptance": round(self.accepted / max(self.drafted, 1), 4),
            "tokens_per_round": round((self.accepted + self.rounds) / max(self.rounds, 1), 3),
        }


@dataclass(frozen=True)
class Written:
    """What one call of ``generate`` made.

    Attributes:
        tokens: New ones, ``[B, new]``.
        drafted, accepted, rounds: In all.
    """

    tokens: Tensor
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0


class Bench:
    """The three models, and the rows' ways to decode.

    Args:
        folder: Of the recursive model.
        new_tokens: Per prompt.
    """

    def __init__(self, folder: Path, new_tokens: int):
        self.new_tokens = new_tokens
        self.tokenizer = load_tokenizer(open_checkpoint(MODEL))
        self.pad = self.tokenizer.pad_token_id or 0
        recursive = RecursiveForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.boundary = recursive.config.layout.layers_before(0)
        with tempfile.TemporaryDirectory() as scratch:
            export_model(folder, Path(scratch) / "dense", check=False)
            unrolled = AutoModelForCausalLM.from_pretrained(Path(scratch) / "dense", dtype=torch.float32)
        self.models: dict[str, PreTrainedModel] = {
            "recursive": recursive,
            "unrolled": unrolled,
            "dense": open_checkpoint(MODEL).load_model(torch.float32),
        }
        for model in self.models.values():
            decode_greedily(model.eval(), new_tokens, self.pad)

    def generate(self, row: Row, batch: dict[str, Tensor], **more: Any) -> Written:
        """Continue ``batch`` as ``row`` does."""
        model, width = self.models[row.model], batch["input_ids"].shape[1]
        if row.early_exit:
            return self._exit_early(model, batch, **more)
        if row.speculate is not None:
            alone = row.speculate == AT_BOUNDARY
            more["speculate"] = SpeculationSettings(layers=self.boundary) if alone else row.speculate
        output = model.generate(**batch, **more)
        tokens = output.sequences[:, width:]
        if row.plain:
            return Written(tokens)
        return Written(tokens, *(int(each.sum()) for each in (output.drafted, output.accepted, output.rounds)))

    def _exit_early(self, model: PreTrainedModel, batch: dict[str, Tensor], **more: Any) -> Written:
        """transformers' self-speculation, its forwards counted: those of fewer layers draft one token each."""
        all_layers, calls = model.config.num_hidden_layers, {True: 0, False: 0}

        def count(*_: Any) -> None:
            calls[model.config.num_hidden_layers < all_layers] += 1

        hook = model.register_forward_pre_hook(count)
        try:
            output = model.generate(**batch, assistant_early_exit=self.boundary, **more)
        finally:
            hook.remove()
        tokens = output.sequences[:, batch["input_ids"].shape[1] :]
        # A forward of all layers makes one token that is its own; the others are drafts that were kept.
        return Written(tokens, calls[True], tokens.numel() - calls[False], calls[False])

    @torch.inference_mode()
    def gap(self, model: PreTrainedModel, prompt: Tensor, mine: Tensor, theirs: Tensor) -> tuple[int, float]:
        """Tokens ``[new]`` before the first that differs, and by how much the model prefers one there to the other."""
        differing = (mine != theirs).nonzero()
        if not len(differing):
            return len(mine), 0.0
        first = int(differing[0])
        logits = model(torch.cat([prompt, theirs[:first]])[None]).logits[0, -1]
        return first, float((logits[theirs[first]] - logits[mine[first]]).abs())


def run_batches(bench: Bench, names: list[str], prompts: list[Tensor], size: int, few: int, save: Any) -> None:
    """All rows on one batch of prompts after the other; ``save`` takes the tallies after each."""
    tallies: dict[str, Tally] = {}
    for start in range(0, len(prompts), size):
        group = prompts[start : start + size]
        batch = pad_left(group, bench.pad)
        written: dict[str, Written] = {}
        spent: dict[str, Spent] = {}
        for name in names:
            row = ROWS[name]
            if size not in row.batches or not (row.everywhere or start < few):
                continue
            if not start:
                bench.generate(row, batch, max_new_tokens=4)
            spent[name], written[name] = timed(partial(bench.generate, row, batch))
            tally = tallies.setdefault(name, Tally())
            tally.prompts += len(group)
            tally.new_tokens += written[name].tokens.numel()
            tally.spent.append(spent[name])
            tally.control_spent.append(spent["plain"])
            tally.drafted += written[name].drafted
            tally.accepted += written[name].accepted
            tally.rounds += written[name].rounds
            control = written[CONTROLS[row.model]]
            for prompt, mine, theirs in zip(group, written[name].tokens, control.tokens, strict=True):
                same, gap = bench.gap(bench.models[row.model], prompt, mine, theirs)
                tally.equal_tokens += same
                tally.differing_prompts += same < len(mine)
                tally.largest_gap = max(tally.largest_gap, gap)
        talk.print(f"batch {size}: {start + len(group)} of {len(prompts)} prompts")
        save(tallies, size)


def write_report(setup: dict[str, Any], output: Path, rows: dict[Any, dict[str, Any]]) -> str:
    """The table with what a reader must know of it."""
    lines = []
    for row in rows.values():
        plain = ROWS[row["row"]].plain
        lines.append(
            [
                ROWS[row["row"]].description,
                f"{row['batch']}",
                f"{row['prompts']}",
                "–" if plain else _equality(row),
                "–" if plain else f"{float(row['acceptance']):.1%}",
                "–" if plain else f"{float(row['tokens_per_round']):.2f}",
                *speed_cells(row),
            ]
        )
    head = ["", "batch", "prompts", "tokens equal", "drafts kept", "tokens per round", *SPEED_HEAD]
    return (
        f"# Draft and verify\n\nMade by `python benchmarks/speculation.py`; figures in `{output.name}`, settings and "
        f"versions in `{output.with_suffix('.json').name}`.\n\n{setup['model_is']}. Greedy, {setup['new_tokens']} new "
        f"tokens after prompts of {PROMPT_LENGTHS[0]} to {PROMPT_LENGTHS[-1]} tokens from {setup['prompts']}; "
        f"{setup['dtype']}, {setup['threads']} thread(s). *Tokens equal*: to the plain output of the same model, up to "
        f"the first that differs. *Drafts kept*: of all drafted; `assistant_early_exit` has its defaults, 20 drafts a "
        f"round unless it is unsure. {SPEED_NOTE} The control is the recursive "
        f"model's plain decoding.\n\n{markdown_table(head, lines)}\n"
    )


def _equality(row: dict[str, Any]) -> str:
    """How many tokens are equal, and where not, by how little the model preferred one."""
    differing = int(row["differing_prompts"])
    if not differing:
        return "100%"
    return f"{float(row['equal_tokens']):.1%} ({differing} prompts differ, logits by {float(row['largest_gap']):.1g})"


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--model-is", default="A recursive model", help="what MODEL is, for the report")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="plain ones are added")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4], choices=[1, 4])
    parser.add_argument("--prompts", type=int, default=20, help="for plain and speculate [%(default)s]")
    parser.add_argument(
        "--few-prompts", type=int, default=8, help="for the other rows, rounded up to a batch [%(default)s]"
    )
    parser.add_argument("--new-tokens", type=int, default=128, help="[%(default)s]")
    parser.add_argument("--output", type=Path, required=True, help="CSV; other rows in it are kept")
    return parser.parse_args()


def main() -> None:
    """Decode in the chosen ways."""
    arguments = read_arguments()
    bench = Bench(arguments.model, arguments.new_tokens)
    text = default_text("held_out")
    prompts = openings(bench.tokenizer, text, arguments.prompts)
    setup = common_setup(arguments.model, arguments.model_is) | {
        "prompts": text.name,
        "new_tokens": arguments.new_tokens,
    }
    results = KeyedResults(
        arguments.output,
        COLUMNS,
        lambda row: (int(row["batch"]), list(ROWS).index(row["row"])),
        setup,
        partial(write_report, setup, arguments.output),
    )

    def save(tallies: dict[str, Tally], size: int) -> None:
        for name, tally in tallies.items():
            results.add(tally.figures(name, size))

    needed = {"plain", *(CONTROLS[ROWS[name].model] for name in arguments.rows), *arguments.rows}
    names = [name for name in ROWS if name in needed]
    for size in arguments.batches:
        run_batches(bench, names, prompts, size, arguments.few_prompts, save)
    print(arguments.output.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
