"""Model card, written from the record and the headers of the weights into ``card_template.md``.

Every figure is in ``recursify.json`` or in those headers. A figure that is not recorded, for instance by an older
recursify, is omitted, never guessed.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from recursify.checkpoint.description import ModelDescription
from recursify.checkpoint.origin import Origin
from recursify.evaluation.tasks import format_score
from recursify.modeling import MINIMUM_TRANSFORMERS

from .publication import without_local_paths

TEMPLATE = Path(__file__).with_name("card_template.md")
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
    """Model card (front matter and body), with warnings about the license for its author."""

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
    if base_model is not None:
        origin = replace(origin, hub_id=base_model)
    if license is not None:
        origin = replace(origin, license=license, license_name=None, license_link=None)
    hub_datasets = {name for run in record.get("history", []) for name in run.get("hub_datasets", [])}
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
        datasets=sorted(hub_datasets) or None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=model_index(record) or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=data.model_name,
        dense_name=origin.hub_id or without_local_paths(description.made_from) or "a dense model",
        repo_id=repo_id,
        model=description,
        picture=picture,
        sizes=_sizes(description, record),
        evaluation=_evaluation_rows(record),
        minimum_transformers=MINIMUM_TRANSFORMERS,
        record=record,
    )
    return Card(str(card), license_warnings(origin))


def license_warnings(origin: Origin) -> list[str]:
    """Warnings about the license of the dense model, as far as its identifier tells."""
    if origin.license is None:
        return ["The license of the dense model is not recorded. Look it up, and pass it with --license."]
    parts, warnings = origin.license.split("-"), []
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
            metrics = [(*names, entry[key]) for key, names in TEXT_METRICS.items() if key in entry]
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


def _sizes(description: ModelDescription, record: dict[str, Any]) -> list[tuple[str, int | None, int]]:
    """Label, dense and recursive size; None for one that is not recorded."""
    dense = record.get("plan", {}).get("dense") or {}
    return [
        ("parameters", dense.get("num_parameters"), description.parameters.stored),
        ("bytes of weights", dense.get("num_bytes"), description.num_bytes),
        ("KV cache, bytes per token", dense.get("kv_bytes_per_token"), description.kv_bytes_per_token),
    ]


def _evaluation_rows(record: dict[str, Any]) -> list[str]:
    rows = [row for entry in record.get("evaluation", []) for row in _entry_rows(entry)]
    runs = [run for run in record.get("history", []) if "perplexity" in run.get("after", {})]
    return rows + (_training_rows(runs[-1]["after"]) if runs else [])


def _entry_rows(entry: dict[str, Any]) -> list[str]:
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


def _training_rows(after: dict[str, Any]) -> list[str]:
    """Rows of the held-out evaluation at the end of an uptraining run."""
    dense = f"{math.exp(after['dense_ce']):,.2f}" if "dense_ce" in after else ""
    rows = [f"| perplexity, held-out part of the training text | all | {after['perplexity']:,.2f} | {dense} | |"]
    for depth in itertools.takewhile(lambda depth: f"perplexity_depth_{depth}" in after, itertools.count()):
        rows.append(f"| the same | {depth} | {after[f'perplexity_depth_{depth}']:,.2f} | | |")
        if (agreement := after.get(f"agreement_depth_{depth}")) is not None:
            rows.append(f"| same argmax as the full model | {depth} | {agreement:.1%} | | |")
    return rows
