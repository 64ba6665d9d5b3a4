"""Quality of a large dense model's conversions and controls, one model in memory at a time (``large_model.py``)."""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from coding_tasks import NEW_TOKENS, TASKS, complete, passes
from dense_controls import count_parameters, drop_layers, factorize_
from keyed_results import Figures, KeyedResults, markdown_table, short
from large_model_file import converted_folder
from measured_process import peak_bytes, reset_peak
from quality import PROMPTS, commit
from quantized_weights import quantize_
from recursify.checkpoint.dense_checkpoint import load_tokenizer, open_checkpoint
from recursify.convert.pipeline import convert_model, plan_conversion
from recursify.evaluation.text import default_text, num_context, read_text, token_windows
from recursify.modeling import RecursiveForCausalLM

WINDOW = 512
LAYOUT: dict[str, Any] = {"num_recursions": 2, "num_prelude_layers": 4, "num_coda_layers": 4, "dtype": "float16"}
CALIBRATED = {"initialization": "calibrated", "relaxation": "calibrated"}
PUBLISHED = {"initialization": "average", "relaxation": "svd"}
MAIN = {**LAYOUT, **CALIBRATED, "lora_rank": 256}
"""Conversion whose number of parameters the controls have."""
CODE = ("textwrap.py", "statistics.py", "fractions.py", "heapq.py")
"""Modules of the standard library that are the second text."""
LOGITS_AT_ONCE = 2**25
"""Elements of one tensor of logits."""


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        name: Value for ``--rows``.
        description: Title in the table.
        settings: Settings of the conversion, None for a model made from the dense one.
        reduce: Function that reduces the dense model in place, given the parameters of ``MAIN`` and the calibration
            windows; returns the reduced model and its number of stored parameters.
        quantization: GGUF type of the stored weights; None keeps float16 (the dense file's own types for ``dense``).
    """

    name: str
    description: str
    settings: dict[str, Any] | None = None
    reduce: Callable[[PreTrainedModel, int, Tensor], tuple[PreTrainedModel, int]] | None = None
    quantization: str | None = None


def _drop(dense: PreTrainedModel, budget: int, windows: Tensor) -> tuple[PreTrainedModel, int]:
    control = drop_layers(dense, budget)
    return control.model, control.num_parameters


def _factorize(dense: PreTrainedModel, budget: int, windows: Tensor) -> tuple[PreTrainedModel, int]:
    control = factorize_(dense, budget, windows)
    return control.model, control.num_parameters


SMALL = {**MAIN, "lora_rank": 64}
LARGE = {**MAIN, "num_prelude_layers": 8, "num_coda_layers": 8}
ROWS = {
    row.name: row
    for row in (
        Row("dense", "dense, the Q4_K_M file"),
        Row("q8_0", "dense, quantized again to Q8_0", quantization="Q8_0"),
        Row("q5_0", "dense, quantized again to Q5_0", quantization="Q5_0"),
        Row("q4_0", "dense, quantized again to Q4_0", quantization="Q4_0"),
        Row("r64", "prelude 4, coda 4, rank 64, calibrated", SMALL),
        Row("r256", "prelude 4, coda 4, rank 256, calibrated", MAIN),
        Row("ends8-r256", "prelude 8, coda 8, rank 256, calibrated", LARGE),
        Row("r64-q8_0", "prelude 4, coda 4, rank 64, calibrated, Q8_0", SMALL, quantization="Q8_0"),
        Row("r256-q8_0", "prelude 4, coda 4, rank 256, calibrated, Q8_0", MAIN, quantization="Q8_0"),
        Row("r256-q4_0", "prelude 4, coda 4, rank 256, calibrated, Q4_0", MAIN, quantization="Q4_0"),
        Row("ends8-r256-q4_0", "prelude 8, coda 8, rank 256, calibrated, Q4_0", LARGE, quantization="Q4_0"),
        Row("r256-published", "prelude 4, coda 4, rank 256, average + SVD (published)", {**MAIN, **PUBLISHED}),
        Row("dropped-layers", "control: whole layers dropped, size of r256", reduce=_drop),
        Row("low-rank-aware", "control: low-rank linear maps (activation-aware), size of r256", reduce=_factorize),
    )
}
ORDER = {name: number for number, name in enumerate(ROWS)}
TEXTS = ("prose", "code")
COLUMNS = [
    "row",
    "description",
    "parameters",
    "of_dense",
    "mb",
    *(f"{text}_{figure}" for text in TEXTS for figure in ("perplexity", "top1_agreement", "kl")),
    "solved",
    "tasks",
    "seconds_to_make",
    "seconds_to_measure",
    "peak_mb",
    "commit",
    "date",
]


@dataclass
class Reference:
    """Outputs of the dense model: final hidden states of every text ``[N, T - 1, D]``, and its head ``[V, D]``."""

    hidden: dict[str, Tensor]
    head: Tensor


@torch.inference_mode()
def final_states(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Inputs of the head that predict tokens, ``[N, T - 1, D]``; the supported families have a plain head."""
    return torch.cat([model.base_model(row, use_cache=False)[0][:, :-1] for row in windows.split(2)])


@torch.inference_mode()
def compare_with(reference: Reference, text: str, model: PreTrainedModel, windows: Tensor, skip: int) -> Figures:
    """Perplexity of a model, its top-1 agreement with the dense one, and ``KL(dense ‖ model)`` in nats per token."""
    hidden, head = final_states(model, windows)[:, skip:].flatten(0, 1), model.get_output_embeddings().weight
    dense, targets = reference.hidden[text][:, skip:].flatten(0, 1), windows[:, 1 + skip :].flatten()
    loss = agreeing = divergence = 0.0
    for rows in torch.arange(len(targets)).split(max(1, LOGITS_AT_ONCE // len(head))):
        logprobs = F.linear(hidden[rows], head).float().log_softmax(-1)
        expected = F.linear(dense[rows], reference.head).float().log_softmax(-1)
        loss += float(F.nll_loss(logprobs, targets[rows], reduction="sum"))
        agreeing += int((logprobs.argmax(-1) == expected.argmax(-1)).sum())
        divergence += float(F.kl_div(logprobs, expected, log_target=True, reduction="sum"))
    count = len(targets)
    return {
        f"{text}_perplexity": f"{math.exp(min(loss / count, 700)):.6g}",
        f"{text}_top1_agreement": round(agreeing / count, 4),
        f"{text}_kl": round(divergence / count, 4),
    }


class Bench:
    """The dense model on disk, the texts, and what is measured with them.

    Args:
        model: Dense model.
        cache: Folder for converted models and the outputs of the dense one.
        num_windows: Windows of each text.
        calibration_tokens: Tokens that conversions and the low-rank control are made with.
        num_tasks: Coding tasks; None for all.
    """

    def __init__(self, model: str, cache: Path, num_windows: int, calibration_tokens: int, num_tasks: int | None):
        self.model, self.cache, self.num_tasks = model, cache, num_tasks
        self.calibration_tokens = calibration_tokens
        self.checkpoint = open_checkpoint(model)
        self.tokenizer = load_tokenizer(self.checkpoint)
        self.num_parameters = sum(info.num_parameters for info in self.checkpoint.parameters.values())
        self.skip = num_context(self.tokenizer) - 1
        stdlib = Path(sysconfig.get_path("stdlib"))
        texts = {"prose": default_text("held_out"), "code": read_text([stdlib / name for name in CODE])}
        self.names = {name: text.name for name, text in texts.items()}
        self.windows = {
            name: token_windows(self.tokenizer, text, WINDOW, max_tokens=num_windows * WINDOW)
            for name, text in texts.items()
        }
        self.calibration = token_windows(
            self.tokenizer, default_text("calibration"), WINDOW, max_tokens=calibration_tokens
        )

    def setup(self) -> Figures:
        """Facts that all rows of one output share."""
        return {
            "model": Path(self.model).name,
            "texts": self.names,
            "windows": {name: len(windows) for name, windows in self.windows.items()},
            "window": WINDOW,
            "calibration_tokens": self.calibration.numel(),
            "new_tokens": NEW_TOKENS,
        }

    def load(self, row: Row) -> tuple[PreTrainedModel, int, int]:
        """The model of ``row`` in float32, its stored parameters, and its bytes on disk."""
        if row.settings is not None:
            folder = self._converted(row)
            model = RecursiveForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            parameters = count_parameters(model)
        else:
            model = self.checkpoint.load_model(torch.float32)
            parameters = count_parameters(model)
        if row.reduce is not None:
            budget = plan_conversion(self.model, **MAIN).recursive.num_parameters
            model, parameters = row.reduce(model, budget, self.calibration)
        if row.quantization is not None:
            return model, parameters, quantize_(model, row.quantization)
        if row.name == "dense" and self.checkpoint.location.is_file():
            return model, parameters, self.checkpoint.location.stat().st_size
        return model, parameters, 2 * parameters

    def _converted(self, row: Row) -> Path:
        """Folder of the converted model of ``row``, which rows of other quantizations share."""
        assert row.settings is not None
        name = row.name.removesuffix(f"-{(row.quantization or '').lower()}")
        folder = converted_folder(self.cache, self.model, name, self.calibration_tokens)
        if not folder.exists():
            options = {**row.settings, "calibration_tokens": self.calibration_tokens}
            convert_model(self.model, folder, check=False, progress=_say_progress, **options)
        return folder

    def reference(self) -> Reference:
        """Outputs of the dense model, computed once and kept in the cache."""
        file = self.cache / f"{Path(self.model).stem}-reference-{self.windows['prose'].shape[0]}.pt"
        if not file.exists():
            dense = self.checkpoint.load_model(torch.float32)
            hidden = {name: final_states(dense, windows) for name, windows in self.windows.items()}
            head = dense.get_output_embeddings().weight.detach()
            torch.save({"hidden": hidden, "head": head, "windows": self.windows}, file)
        saved = torch.load(file, mmap=True)
        if any(not torch.equal(windows, saved["windows"][name]) for name, windows in self.windows.items()):
            raise SystemExit(f"'{file}' was made of other texts; remove it.")
        return Reference(saved["hidden"], saved["head"])

    def measure(self, row: Row) -> tuple[Figures, list[str]]:
        """The figures of ``row``, by column, and its continuations of the prompts."""
        reference = self.reference()
        reset_peak()
        start = time.perf_counter()
        model, parameters, num_bytes = self.load(row)
        made = time.perf_counter()
        figures: Figures = {"row": row.name, "description": row.description, "parameters": parameters}
        figures["of_dense"] = round(parameters / self.num_parameters, 4)
        figures["mb"] = round(num_bytes / 1e6, 1)
        for text, windows in self.windows.items():
            figures |= compare_with(reference, text, model, windows, self.skip)
        tasks = TASKS[: self.num_tasks]
        prompts = [*PROMPTS, *(task.prompt for task in tasks)]
        texts = complete(model, self.tokenizer, prompts, NEW_TOKENS)
        continuations, completions = texts[: len(PROMPTS)], texts[len(PROMPTS) :]
        figures |= {"solved": sum(map(passes, tasks, completions)), "tasks": len(tasks)}
        return figures | {
            "seconds_to_make": round(made - start, 1),
            "seconds_to_measure": round(time.perf_counter() - made, 1),
            "peak_mb": round(peak_bytes() / 1e6),
            "commit": commit(),
            "date": datetime.now(UTC).date().isoformat(),
        }, continuations


def _say_progress(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done}/{total}", file=sys.stderr, flush=True)


def report(rows: dict[Any, Figures]) -> str:
    """The table in Markdown, with what a reader must know of it."""
    head = ["", "parameters", "MB", "perplexity, prose", "perplexity, code", "top-1", "KL", "top-1, code", "KL, code"]
    head.append("tasks solved")
    lines = []
    for row in rows.values():
        figures = [
            row["description"],
            f"{int(row['parameters']) / 1e6:,.0f}M",
            f"{float(row['mb']):,.0f}",
            *(short(row[f"{text}_perplexity"]) for text in TEXTS),
        ]
        for text in TEXTS:
            figures += [f"{float(row[f'{text}_top1_agreement']):.1%}", f"{float(row[f'{text}_kl']):.3f}"]
        lines.append([*figures, f"{row['solved']} of {row['tasks']}"])
    return (
        "# A larger model\n\n"
        "Made by `python benchmarks/large_model.py quality`; figures in `large_model.csv`, continuations of five "
        "prompts in `large_model_samples.json`.\n\n"
        "`Qwen2.5-Coder-1.5B-Instruct`, **no training**. The dense model is a Q4_K_M file. Its dequantized weights are "
        "the reference of agreement and KL, and what all other rows are made from; so the dense rows that are "
        "quantized again are worse than a quantization of the original weights. Recursive models are stored in "
        "float16 where no quantization is named. Calibrated on the help topics of CPython, every fifth of which is "
        f"the prose; the code is {len(CODE)} modules of the standard library. The coding tasks are twenty short "
        f"functions (`coding_tasks.py`), completed greedily.\n\n{markdown_table(head, lines)}\n"
    )


def write_table(model: str, arguments: argparse.Namespace) -> None:
    """Measure the rows that ``--rows`` names and write them as they are done."""
    names = list(ROWS) if arguments.rows == "all" else arguments.rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        raise SystemExit(f"Unknown rows: {', '.join(unknown)}. Use all, or some of: {', '.join(ROWS)}.")
    torch.set_num_threads(arguments.threads)
    bench = Bench(model, arguments.cache, arguments.windows, arguments.tokens, arguments.tasks)
    output = arguments.results / "large_model.csv"
    results = KeyedResults(output, COLUMNS, lambda row: (ORDER[row["row"]],), bench.setup(), report)
    samples_file = output.with_name("large_model_samples.json")
    for name in names:
        print(f"{name}: making", file=sys.stderr, flush=True)
        figures, continuations = bench.measure(ROWS[name])
        results.add(figures)
        samples = json.loads(samples_file.read_text(encoding="utf-8")) if samples_file.exists() else {}
        samples[name] = dict(zip(PROMPTS, continuations, strict=True))
        samples_file.write_text(json.dumps(samples, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{name}: {figures}", file=sys.stderr, flush=True)
    print(report(results.rows))
