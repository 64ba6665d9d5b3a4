"""Model card, written from the record and the headers of the weights.

Every figure is in ``recursify.json`` or in those headers. A figure that is not recorded, for instance by an older
recursify, is omitted, never guessed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from recursify.checkpoint.description import ModelDescription
from recursify.checkpoint.origin import Origin
from recursify.evaluation.tasks import format_score
from recursify.modeling import MINIMUM_TRANSFORMERS

from .publication import without_local_paths

TAGS = ["recursify", "recursive", "parameter-sharing", "relaxed-recursive-transformer", "custom_code"]

NO_DERIVATIVES = "nd"
NON_COMMERCIAL = "nc"
CONDITIONS = {
    "llama2": "requires derivatives to include its text and notice",
    "llama3": "requires names of derivatives to begin with 'Llama 3', and 'Built with Meta Llama 3' to be displayed",
    "llama3.1": "requires names of derivatives to begin with 'Llama', and 'Built with Llama' to be displayed",
    "llama3.2": "requires names of derivatives to begin with 'Llama', and 'Built with Llama' to be displayed",
    "llama3.3": "requires names of derivatives to begin with 'Llama', and 'Built with Llama' to be displayed",
    "llama4": "requires names of derivatives to begin with 'Llama', and 'Built with Llama' to be displayed",
    "gemma": "requires its use restrictions to be passed on with a derivative",
    "other": "is a custom one",
}
"""Conditions of licenses, by the Hub's identifiers, on sharing a derivative."""

TEXT_METRICS = {
    "perplexity": ("perplexity", "Perplexity"),
    "top1_agreement": ("accuracy", "Same argmax as the dense model"),
    "kl": ("kl_divergence", "KL from the dense model, nats per token"),
}
"""Type and name in the model index, per figure of a text evaluation."""


@dataclass(frozen=True)
class Card:
    """Model card, with warnings for its author.

    Attributes:
        text: Front matter and body.
        warnings: Warnings about the license.
    """

    text: str
    warnings: list[str]


def write_card(
    description: ModelDescription,
    record: dict[str, Any],
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    picture: str | None = None,
) -> Card:
    """Write the card of a recursive model.

    Args:
        description: Description of the model's folder.
        record: Content of ``recursify.json`` without local paths.
        repo_id: Repository of the model, ``owner/name``.
        base_model: Hub id of the dense model; None takes the recorded one.
        license: License of the model; None takes the recorded one of the dense model.
        picture: File name of a picture of the layout, beside the card.
    """
    origin = Origin.from_mapping(record.get("base") or {})
    origin = replace(origin, hub_id=base_model or origin.hub_id)
    if license is not None:
        origin = replace(origin, license=license, license_name=None, license_link=None)
    data = ModelCardData(
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        language=list(origin.languages) or None,
        base_model=origin.hub_id,
        base_model_relation="finetune" if origin.hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        datasets=_hub_datasets(record) or None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=model_index(record) or None,
    )
    name = origin.hub_id or without_local_paths(description.made_from) or "a dense model"
    sections = [
        f"# {repo_id.rpartition('/')[2]}",
        _introduction(description, name),
        _layout(description, picture),
        _sizes(description, record),
        _evaluation(record, description),
        _how_to_load(description, repo_id),
        _how_it_was_made(record, name),
        _limits(description),
    ]
    body = "\n\n".join(section for section in sections if section)
    return Card(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")), license_warnings(origin))


def license_warnings(origin: Origin) -> list[str]:
    """Warnings about the license of the dense model, as far as its identifier tells."""
    if origin.license is None:
        return ["The license of the dense model is not recorded. Look it up, and pass it with --license."]
    parts = origin.license.split("-")
    warnings = []
    if NO_DERIVATIVES in parts:
        warnings.append(
            f"The dense model's license, {origin.license}, forbids sharing derivatives, and this is a derivative."
        )
    if NON_COMMERCIAL in parts:
        warnings.append(f"The dense model's license, {origin.license}, forbids commercial use, also of derivatives.")
    if condition := CONDITIONS.get(origin.license):
        where = f" ({origin.license_link})" if origin.license_link else ""
        warnings.append(
            f"The dense model's license, {origin.license_name or origin.license}{where}, {condition}. Read it."
        )
    return warnings


def model_index(record: dict[str, Any]) -> list[EvalResult]:
    """Evaluation results at full depth."""
    results = []
    for entry in record.get("evaluation", []):
        if entry.get("depth") is not None:
            continue
        if entry["kind"] == "text":
            figures = {key: entry[key] for key in TEXT_METRICS if key in entry}
            metrics = [(*TEXT_METRICS[key], value) for key, value in figures.items()]
        else:
            metrics = [(entry["metric"], entry["metric"], entry["value"])]
        results += [
            EvalResult(
                task_type="text-generation",
                dataset_type=entry["name"],
                dataset_name=entry["name"],
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 6),
            )
            for kind, name, value in metrics
            if math.isfinite(value)
        ]
    return results


def _hub_datasets(record: dict[str, Any]) -> list[str]:
    """Hub ids of the datasets that the model was uptrained on."""
    return sorted({name for run in record.get("history", []) for name in run.get("hub_datasets", [])})


def _introduction(description: ModelDescription, name: str) -> str:
    layout, parameters = description.layout, description.parameters
    return (
        f"A *recursive* version of {name}, made with [recursify](https://github.com/recursify/recursify): "
        f"{layout.num_unique_layers} stored layers run as {layout.num_layers}, because a block of "
        f"{layout.block_size} is applied {layout.num_recursions} times. It stores "
        f"{parameters.stored / 1e6:,.1f}M parameters and computes with {parameters.effective / 1e6:,.1f}M."
    )


def _layout(description: ModelDescription, picture: str | None) -> str:
    image = f"![Layout]({picture})\n\n" if picture else ""
    return f"## Layout\n\n{image}```text\n{description.layout_text()}\n```\n\n{_residuals(description)}"


def _residuals(description: ModelDescription) -> str:
    norms = "All depths share one set of norms." if description.tie_norms else "Every depth has its own norms."
    if not description.parameters.residuals:
        return f"Depths share their linear maps without residuals. {norms}"
    own = len(description.lora_rank_pattern)
    further = f"; {own} maps have ranks of their own" if own else ""
    return (
        f"Every depth adds a low-rank residual (rank {description.lora_rank}{further}) to each shared linear map. "
        f"{norms}"
    )


def _sizes(description: ModelDescription, record: dict[str, Any]) -> str:
    dense, parameters = record.get("plan", {}).get("dense") or {}, description.parameters
    kv = description.kv_bytes_per_token
    rows = [
        ("parameters", dense.get("num_parameters"), parameters.stored),
        ("bytes of weights", dense.get("num_bytes"), description.num_bytes),
        ("KV cache, bytes per token", dense.get("kv_bytes_per_token"), kv),
    ]
    lines = [f"| {what} | {_count(before)} | {_count(after)} |" for what, before, after in rows]
    return "\n".join(["## Size", "", "| | dense | this model |", "|---|--:|--:|", *lines])


def _count(value: int | None) -> str:
    return "not recorded" if value is None else f"{value:,}"


def _evaluation(record: dict[str, Any], description: ModelDescription) -> str:
    entries = record.get("evaluation", [])
    rows = [row for entry in entries for row in _evaluation_rows(entry)]
    runs = [run for run in record.get("history", []) if "perplexity" in run.get("after", {})]
    rows += _training_rows(runs[-1]) if runs else []
    if not rows:
        return "## Evaluation\n\nThis model has not been evaluated."
    table = ["| | depth | this model | dense | n |", "|---|---|--:|--:|--:|", *rows]
    return "\n".join(
        [
            "## Evaluation",
            "",
            "Measured by recursify, the dense figures in the same run; ± is one standard error.",
            "",
            *table,
        ]
    )


def _evaluation_rows(entry: dict[str, Any]) -> list[str]:
    depth = "all" if entry.get("depth") is None else str(entry["depth"])
    if entry["kind"] == "text":
        tokens = f"{entry['num_tokens']:,} tokens"
        dense = f"{entry['dense_perplexity']:,.2f}" if "dense_perplexity" in entry else ""
        rows = [f"| perplexity, {entry['name']} | {depth} | {entry['perplexity']:,.2f} | {dense} | {tokens} |"]
        if "top1_agreement" in entry:
            rows.append(f"| same argmax as dense | {depth} | {entry['top1_agreement']:.1%} | | {tokens} |")
        if "kl" in entry:
            rows.append(f"| KL from dense, nats per token | {depth} | {entry['kl']:.3f} | | {tokens} |")
        return rows
    value, dense_value = format_score(entry["value"], entry.get("stderr")), ""
    if entry.get("dense_value") is not None:
        dense_value = format_score(entry["dense_value"], entry.get("dense_stderr"))
    return [
        f"| {entry['name']}, {entry['metric']} | {depth} | {value} | {dense_value} | {entry.get('num_samples') or ''} |"
    ]


def _training_rows(run: dict[str, Any]) -> list[str]:
    """Table rows of the held-out evaluation at the end of the last uptraining run."""
    after = run["after"]
    dense = f"{math.exp(after['dense_ce']):,.2f}" if "dense_ce" in after else ""
    rows = [f"| perplexity, held-out part of the training text | all | {after['perplexity']:,.2f} | {dense} | |"]
    depth = 0
    while f"perplexity_depth_{depth}" in after:
        rows.append(f"| the same | {depth} | {after[f'perplexity_depth_{depth}']:,.2f} | | |")
        agreement = after.get(f"agreement_depth_{depth}")
        if agreement is not None:
            rows.append(f"| same argmax as the full model | {depth} | {agreement:.1%} | | |")
        depth += 1
    return rows


def _how_to_load(description: ModelDescription, repo_id: str) -> str:
    lines = [
        "## How to load",
        "",
        f"transformers ≥ {MINIMUM_TRANSFORMERS} runs it with the code in this repository, which you should read first.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'name = "{repo_id}"',
        "model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)",
        "tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "```",
        "",
        "With recursify installed, `import recursify` replaces `trust_remote_code=True`, and "
        f"`recursify export {repo_id.rpartition('/')[2]} -o DIR --format dense` writes a downloaded copy as a stock "
        f"checkpoint of the {description.family} family for other servers.",
    ]
    depths = description.exits and description.exits.depths
    if depths:
        lines += [
            "",
            f"It has trained exits after depth {', '.join(map(str, depths))}. With `exit_depth`, every token exits "
            f"there, which is faster and changes the output.",
            "",
            "```python",
            f"model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, exit_depth={depths[0]})",
            "```",
        ]
    return "\n".join(lines)


def _how_it_was_made(record: dict[str, Any], name: str) -> str:
    plan = record.get("plan", {})
    lines = ["## How it was made", ""]
    if plan.get("initialization"):
        residuals = f", residuals by `{plan['relaxation']}`" if plan.get("relaxation") else ""
        lines.append(f"Converted from {name}: shared weights by `{plan['initialization']}`{residuals}.")
    if text := (record.get("calibration") or {}).get("text"):
        lines.append(f"Calibrated on {text}.")
    for run in record.get("history", []):
        rate = run.get("settings", {}).get("learning_rate")
        at = f", peak learning rate {rate:g}" if rate else ""
        stage = run.get("settings", {}).get("stage", "heal")
        tokens, data = (
            f"{run['tokens']:,}" if "tokens" in run else "unrecorded",
            run.get("data_name", "unrecorded data"),
        )
        lines.append(f"Uptrained ({stage}) on {tokens} tokens of {data}{at}.")
    if not record.get("history"):
        lines.append("It has not been uptrained, so it is a starting point, not a replacement for the dense model.")
    if version := record.get("recursify_version"):
        lines.append(f"Written by recursify {version}; `recursify.json` has all settings.")
    return "\n".join(lines)


def _limits(description: ModelDescription) -> str:
    lines = [
        "## Limits",
        "",
        "- The KV cache is as large as the dense model's: every effective layer keeps its own keys and values.",
        "- At full depth it computes as much as the dense model, so it is smaller, not faster.",
        "- Perplexity recovers before task accuracy does: evaluate your own task before you rely on it.",
    ]
    if description.exits:
        lines.append("- An early exit is lossy: its output differs from the full model's.")
    return "\n".join(lines)
