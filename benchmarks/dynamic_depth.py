"""Mean depth, agreement, perplexity and speed of every exit policy, at thresholds chosen for an agreement.

::

    python benchmarks/dynamic_depth.py MODEL --output benchmarks/results/dynamic_depth.csv

``MODEL`` is a recursive model with trained exits. A held-out text is read once, at all exits. Thresholds are chosen on
its first half as ``recursify calibrate-exits`` chooses them; agreement, mean depth and perplexity are those of the
second half, every token being predicted by the exit that it leaves by. Then the same prompts are continued greedily in
every way: all rows take their turn at a prompt before the next one, and speeds are those of a row over the model's own
plain decoding at full depth. Beside that stand the dense model, and an oracle, which is a simulation.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from keyed_results import KeyedResults, markdown_table, short
from quality import MODEL, WINDOW, commit
from recursify.checkpoint.dense_checkpoint import load_tokenizer, open_checkpoint
from recursify.cli.report import talk
from recursify.evaluation.exit_thresholds import (
    ExitPredictions,
    apply_thresholds,
    choose_thresholds,
    exit_contexts,
)
from recursify.evaluation.exits import ExitStatistics, exit_statistics
from recursify.evaluation.perplexity import perplexity
from recursify.evaluation.text import default_text, token_windows
from recursify.modeling import EXIT_POLICIES, ExitSettings, RecursiveForCausalLM, make_policy

COLUMNS = (
    "row",
    "target",
    "kv",
    "thresholds",
    "agreement",
    "gap_points",
    "mean_depth",
    "perplexity",
    "text_tokens",
    "left_early",
    "layers_per_token",
    "decoding_agreement",
    "decoded_tokens",
    *SPEED_COLUMNS,
    "commit",
    "date",
)
POLICIES = ("head", "confidence", "entropy", "saturation", "convergence", "divergence")
TARGETS = (0.9, 0.95)
APPROXIMATE = ("copied", "latest")
WINDOWS_PER_BATCH = 2
AIM = 2.0
"""Points by which the agreement on held-out text may miss its target."""


@dataclass(frozen=True)
class Row:
    """One way to decide how deep a token runs.

    Attributes:
        name: A policy, or ``full``, ``never``, ``oracle``, ``dense``.
        target: The agreement that thresholds are chosen for.
        kv: Where keys and values of skipped depths come from, where any are skipped.
    """

    name: str
    target: float | None = None
    kv: str = "deferred"

    @property
    def description(self) -> str:
        """For a reader."""
        names = {
            "full": "full depth (control)",
            "never": "full depth by the exit decoder: `confidence` at 1",
            "fixed": "every token by the first exit",
            "oracle": "oracle (a simulation)",
            "dense": "dense model (control)",
        }
        kv = f", kv {self.kv}" if self.kv in APPROXIMATE else ""
        return names.get(self.name, f"`{self.name}`{kv}")


ROWS = (
    Row("full", kv=""),
    Row("never"),
    *(Row(name, target) for name in POLICIES for target in TARGETS),
    *(Row("confidence", TARGETS[-1], kv) for kv in APPROXIMATE),
    Row("fixed"),
    Row("oracle", kv=""),
    Row("dense", kv=""),
)


@dataclass(frozen=True)
class Reading:
    """What every exit and the whole model make of every token of a text.

    Attributes:
        confidences: By policy, ``[E, N]``.
        agrees: ``[E, N]`` bool: whether the exit puts first what the last recursion does.
        losses: ``[E + 1, N]``: nats for the token that follows, of every exit and of the last recursion.
    """

    confidences: dict[str, Tensor]
    agrees: Tensor
    losses: Tensor

    def halves(self, policy: str) -> tuple[ExitPredictions, ExitPredictions]:
        """As :meth:`ExitPredictions.split` has them."""
        return ExitPredictions(self.confidences[policy], self.agrees).split()

    def perplexity(self, exits: Tensor) -> float:
        """Of the second half, each token by the one of ``exits [N / 2]`` that it leaves by; E for none."""
        second = self.losses[:, self.losses.shape[1] // 2 :]
        return math.exp(float(second.gather(0, exits[None]).double().mean()))


@torch.inference_mode()
def read_text(model: RecursiveForCausalLM, windows: Tensor) -> Reading:
    """Read ``[W, T]`` windows once for all policies."""
    policies = {name: make_policy(name) for name in POLICIES if not EXIT_POLICIES[name].needs_head or model.exit_heads}
    confidences: dict[str, list[Tensor]] = {name: [] for name in policies}
    agrees, losses = [], []
    batches = windows.split(WINDOWS_PER_BATCH)
    for done, batch in enumerate(batches):
        boundaries, last_states = exit_contexts(model, batch)
        last = model.compute_logits(last_states)
        for name, policy in policies.items():
            confidences[name].append(torch.stack([policy.confidence(each) for each in boundaries]).float())
        agrees.append(torch.stack([each.logits.argmax(-1) == last.argmax(-1) for each in boundaries]))
        said = [*(each.logits for each in boundaries), last]
        following = batch[:, 1:].flatten()
        losses.append(
            torch.stack([torch.nn.functional.cross_entropy(each, following, reduction="none") for each in said])
        )
        talk.print(f"read {done + 1} of {len(batches)}")
    joined = {name: torch.cat(each, dim=1) for name, each in confidences.items()}
    return Reading(joined, torch.cat(agrees, dim=1), torch.cat(losses, dim=1))


def exits_taken(leaves: Tensor) -> Tensor:
    """The first exit that each token may leave by, ``[N]``, given which it may ``[E, N]``; E for none."""
    num_exits = len(leaves)
    return torch.where(leaves.any(0), leaves.int().argmax(0), num_exits)


def text_figures(row: Row, reading: Reading, dense_perplexity: float) -> tuple[dict[str, Any], list[float] | None]:
    """What a row does to the second half of the text, and the thresholds that were chosen on the first."""
    agrees = reading.agrees[:, reading.agrees.shape[1] // 2 :]
    if row.name == "dense":
        return {"perplexity": f"{dense_perplexity:.6g}", "text_tokens": agrees.shape[1]}, None
    thresholds = None
    if row.target is not None:
        first, second = reading.halves(row.name)
        thresholds = choose_thresholds(first, row.target, EXIT_POLICIES[row.name].lowest)
        outcome = apply_thresholds(second, thresholds, row.target)
        leaves = second.confidences > torch.tensor(thresholds)[:, None]
    elif row.name in ("full", "never"):
        leaves = torch.zeros_like(agrees)
    else:
        leaves = agrees if row.name == "oracle" else torch.ones_like(agrees)
    exits = exits_taken(leaves)
    everywhere = torch.cat([agrees, torch.ones_like(agrees[:1])])
    figures = {
        "agreement": round(float(everywhere.gather(0, exits[None]).float().mean()), 4),
        "mean_depth": round(float(exits.float().mean()), 4),
        "perplexity": f"{reading.perplexity(exits):.6g}",
        "text_tokens": agrees.shape[1],
    }
    if thresholds is not None:
        assert row.target is not None
        figures["thresholds"] = ";".join(f"{each:.6g}" for each in thresholds)
        figures["gap_points"] = round(100 * (outcome.agreement - row.target), 2)
    return figures, thresholds


@dataclass
class Tally:
    """What a row did to the prompts so far."""

    spent: list[Spent] = field(default_factory=list)
    control_spent: list[Spent] = field(default_factory=list)
    new_tokens: int = 0
    statistics: list[ExitStatistics] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """As columns of the CSV; those of exits for the tokens after the first, which is the prompt's."""
        figures = speed_figures(self.spent, self.control_spent, self.new_tokens) | {"decoded_tokens": self.new_tokens}
        if not self.statistics:
            return figures
        counted = sum(each.num_tokens for each in self.statistics)

        def mean(per_token: Callable[[ExitStatistics], float]) -> float:
            return sum(per_token(each) * each.num_tokens for each in self.statistics) / counted

        return figures | {
            "left_early": round(1 - mean(lambda each: each.histogram[-1] / each.num_tokens), 4),
            "layers_per_token": round(mean(lambda each: each.mean_layers), 3),
            "decoding_agreement": round(mean(lambda each: each.agreement or 0.0), 4),
        }


def settings_of(row: Row, thresholds: list[float] | None) -> ExitSettings | None:
    """How ``generate`` exits in a row; None for plain decoding."""
    if row.name in ("full", "dense"):
        return None
    if row.name == "never":
        return ExitSettings(make_policy("confidence", 1.0))
    return ExitSettings(make_policy(row.name, 0 if row.name == "fixed" else thresholds), kv=row.kv)


class Decoding:
    """Continues prompts in every way.

    Args:
        model: The recursive one.
        dense: Its control.
        settings: By row; the first is the control of speed.
    """

    def __init__(self, model: RecursiveForCausalLM, dense: Any, settings: dict[Row, ExitSettings | None]):
        self.model = model
        self.dense = dense
        self.settings = settings
        self.tallies = {row: Tally() for row in settings}

    def run(self, prompt: dict[str, Tensor]) -> None:
        """All rows on one prompt, one after the other."""
        control: Spent | None = None
        for row, settings in self.settings.items():
            model = self.dense if row.name == "dense" else self.model
            spent, output = timed(partial(model.generate, **prompt, **_given(settings)))
            control = control or spent
            tally = self.tallies[row]
            tally.spent.append(spent)
            tally.control_spent.append(control)
            tally.new_tokens += output.sequences.shape[1] - prompt["input_ids"].shape[1]
            if settings is not None:
                num_exits = len(self.model.config.exit_depths)
                tally.statistics.append(
                    exit_statistics(self.model, output, prompt["attention_mask"], num_exits, agreement=True)
                )

    def warm_up(self, prompt: dict[str, Tensor]) -> None:
        """What a first call costs is not measured."""
        for row, settings in self.settings.items():
            model = self.dense if row.name == "dense" else self.model
            model.generate(**prompt, **_given(settings), max_new_tokens=4)


def _given(settings: ExitSettings | None) -> dict[str, Any]:
    return {} if settings is None else {"exit_policy": settings}


def write_report(setup: dict[str, Any], output: Path, rows: dict[Any, dict[str, Any]]) -> str:
    """The table with what a reader must know of it."""
    lines = [_line(row) for row in rows.values()]
    head = ["", "target", "agreement", "mean depth", "perplexity", "left early", "layers", "agreement, decoding"]
    return (
        f"# Dynamic depth\n\nMade by `python benchmarks/dynamic_depth.py`; figures in `{output.name}`, settings and "
        f"versions in `{output.with_suffix('.json').name}`.\n\n{setup['model_is']}: {setup['layers']}. *Agreement*, "
        f"*mean depth* and *perplexity*: of the second half of {setup['text_tokens']:,} tokens of {setup['text']}, "
        f"read in windows of {WINDOW} with the keys and values of full depth; thresholds are chosen on the first half. "
        f"Agreement is with the last recursion, over all tokens. The first exit has depth 0, the last recursion "
        f"{setup['num_exits']}. {_hits(setup, rows)} "
        f"The other columns: {setup['prompts']} prompts of {PROMPT_LENGTHS[0]} to {PROMPT_LENGTHS[-1]} tokens "
        f"continued by {setup['new_tokens']} each, greedily, one at a time; {setup['dtype']}, {setup['threads']} "
        f"thread(s). *Left early*: share of new tokens that exited early. "
        f"*Layers*: that ran per token, those of the coda at exits included, "
        f"but no readout. {SPEED_NOTE} The control is plain decoding at full depth.\n\n"
        f"{markdown_table([*head, *SPEED_HEAD], lines)}\n"
    )


def _hits(setup: dict[str, Any], rows: dict[Any, dict[str, Any]]) -> str:
    """How near agreements came to their targets."""
    aimed = [row for row in rows.values() if row.get("gap_points") not in (None, "") and row["kv"] not in APPROXIMATE]
    missed = []
    for row in aimed:
        gap = float(row["gap_points"])
        if abs(gap) > AIM:
            why = ", no token leaves" if float(row["mean_depth"]) == setup["num_exits"] else ""
            missed.append(f"`{row['row']}` at {float(row['target']):.0%} ({gap:+.2f}{why})")
    hit = f"{len(aimed) - len(missed)} of {len(aimed)} hit their target within {AIM:g} points there"
    return f"{hit}; the others: {', '.join(missed)}." if missed else f"{hit}."


def _line(row: dict[str, Any]) -> list[str]:
    """One row of the table."""

    def cell(name: str, form: Callable[[float], str]) -> str:
        return "–" if row.get(name) in (None, "") else form(float(row[name]))

    target = None if row.get("target") in (None, "") else float(row["target"])
    return [
        Row(row["row"], target, row["kv"]).description,
        cell("target", "{:.0%}".format),
        cell("agreement", "{:.1%}".format),
        cell("mean_depth", "{:.2f}".format),
        cell("perplexity", short),
        cell("left_early", "{:.1%}".format),
        cell("layers_per_token", "{:.1f}".format),
        cell("decoding_agreement", "{:.1%}".format),
        *(speed_cells(row) if row.get("speed_ratio") not in (None, "") else ["–", "–"]),
    ]


def row_key(figures: dict[str, Any]) -> tuple[int]:
    """In the order of :data:`ROWS`."""
    target = None if figures.get("target") in (None, "") else float(figures["target"])
    return (ROWS.index(Row(figures["row"], target, figures["kv"])),)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--model-is", default="A recursive model", help="what MODEL is, for the report")
    parser.add_argument("--windows", type=int, default=None, help=f"of {WINDOW} tokens; all if not given")
    parser.add_argument("--prompts", type=int, default=8, help="[%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=64, help="[%(default)s]")
    parser.add_argument("--output", type=Path, required=True, help="CSV; other rows in it are kept")
    return parser.parse_args()


def main() -> None:
    """Read the text, choose thresholds, and decode."""
    arguments = read_arguments()
    tokenizer = load_tokenizer(open_checkpoint(MODEL))
    model = RecursiveForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    dense = open_checkpoint(MODEL).load_model(torch.float32).eval()
    text = default_text("held_out")
    windows = token_windows(tokenizer, text, WINDOW, min_windows=2)[: arguments.windows]
    windows = windows[: len(windows) // 2 * 2]  # so that halves are of whole windows
    setup = common_setup(arguments.model, arguments.model_is) | {
        "layers": f"{model.config.layout}, {model.config.layout.num_layers} in all",
        "num_exits": len(model.config.exit_depths),
        "exit_through_coda": model.config.exit_through_coda,
        "text": text.name,
        "text_tokens": windows.numel(),
        "prompts": arguments.prompts,
        "new_tokens": arguments.new_tokens,
    }
    results = KeyedResults(arguments.output, COLUMNS, row_key, setup, partial(write_report, setup, arguments.output))
    reading = read_text(model, windows)
    control = perplexity(dense, windows[len(windows) // 2 :]).perplexity
    rows = [row for row in ROWS if row.name not in POLICIES or row.name in reading.confidences]
    figures, settings = {}, {}
    for row in rows:
        figures[row], thresholds = text_figures(row, reading, control)
        if row.name != "oracle":
            settings[row] = settings_of(row, thresholds)
    pad = tokenizer.pad_token_id or 0
    for each in (model, dense):
        decode_greedily(each, arguments.new_tokens, pad)
    decoding = Decoding(model, dense, settings)
    prompts = [pad_left([prompt], pad) for prompt in openings(tokenizer, text, arguments.prompts)]
    decoding.warm_up(prompts[0])
    for done, prompt in enumerate(prompts):
        decoding.run(prompt)
        talk.print(f"decoded {done + 1} of {len(prompts)} prompts")
        save(results, figures, decoding.tallies)
    print(arguments.output.with_suffix(".md").read_text(encoding="utf-8"))


def save(results: KeyedResults, figures: dict[Row, dict[str, Any]], tallies: dict[Row, Tally]) -> None:
    """Write all rows as they stand."""
    for row, of_text in figures.items():
        results.add(
            {
                "row": row.name,
                "target": "" if row.target is None else row.target,
                "kv": row.kv,
                **of_text,
                **(tallies[row].figures() if row in tallies else {}),
                "commit": commit(),
                "date": datetime.now(UTC).date().isoformat(),
            }
        )


if __name__ == "__main__":
    main()
