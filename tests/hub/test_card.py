"""The model card: what was recorded and measured, and nothing else."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from recursify.checkpoint.description import inspect_model
from recursify.checkpoint.origin import Origin, origin_of_folder
from recursify.checkpoint.record import read_record, update_record
from recursify.hub.card import license_warnings, write_card
from recursify.hub.publication import without_local_paths
from recursify.modeling import MINIMUM_TRANSFORMERS, RecursiveForCausalLM


def card_of(folder: Path, **options) -> tuple[ModelCard, list[str]]:
    record = without_local_paths(read_record(folder))
    card = write_card(inspect_model(folder), record, "me/tiny", **options)
    return ModelCard(card.text), card.warnings


def test_a_converted_model(converted):
    """Licence inherited, sizes of both, layout by depth, and in the model index exactly what was measured."""
    card, warnings = card_of(converted, base_model="org/dense")
    data = card.data.to_dict()
    assert warnings == []
    assert (data["license"], data["language"], data["base_model"]) == ("apache-2.0", ["en"], "org/dense")
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"recursive", "custom_code", "recursify"} <= set(data["tags"])
    measured = read_record(converted)["evaluation"][0]
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {
        "perplexity": round(measured["perplexity"], 6),
        "accuracy": round(measured["top1_agreement"], 6),
        "kl_divergence": round(measured["kl"], 6),
    }
    text = card.text
    assert "depth 0: 1-2, depth 1: 3-4" in text
    facts = inspect_model(converted)
    assert f"| {facts.parameters.stored:,} |" in text
    assert f"| {read_record(converted)['plan']['dense']['num_parameters']:,} |" in text
    assert "rank 4" in text
    assert 'name = "me/tiny"' in text
    assert "It has not been uptrained" in text
    assert "exit_depth" not in text
    assert str(converted.parent) not in card.content


def test_an_uptrained_model_with_exits(trained):
    """Tokens and data by name, held-out figures by depth, and how to exit."""
    model = RecursiveForCausalLM.from_pretrained(trained)
    model.add_exit_heads("norm")
    model.save_pretrained(trained)
    card, _ = card_of(trained)
    assert "Uptrained (heal) on 30,000 tokens of notes, peak learning rate 0.0001." in card.text
    assert "| perplexity, held-out part of the training text | all | 17.25 | 12.18 | |" in card.text
    assert "| same argmax as the full model | 0 | 25.0% | | |" in card.text
    assert "trust_remote_code=True, exit_depth=0)" in card.text
    assert "An early exit is lossy" in card.text
    assert card.data.to_dict()["datasets"] == ["owner/stories"]


def test_tasks_are_listed_by_depth_and_indexed_at_full_depth(folder):
    """With standard errors and the dense control."""
    entry = {"kind": "task", "name": "tiny_mc", "metric": "acc", "stderr": 0.05, "num_samples": 40}
    shallow = {**entry, "depth": 0, "value": 0.25, "dense_value": 0.5, "dense_stderr": 0.06}
    update_record(folder, evaluation=[shallow, {**shallow, "depth": None, "value": 0.4}])
    card, _ = card_of(folder)
    assert "| tiny_mc, acc | 0 | 0.2500 ± 0.0500 | 0.5000 ± 0.0600 | 40 |" in card.text
    assert "| tiny_mc, acc | all | 0.4000 ± 0.0500 | 0.5000 ± 0.0600 | 40 |" in card.text
    assert [(r.dataset_name, r.metric_value) for r in card.data.eval_results] == [("tiny_mc", 0.4)]


def test_records_that_lack_parts_are_no_error(folder):
    """Runs without figures or names, a text without a control, a metric that is no number."""
    text = {"kind": "text", "name": "a book", "depth": None, "num_tokens": 5, "perplexity": 9.0}
    task = {"kind": "task", "name": "t", "metric": "acc", "depth": None, "value": float("nan")}
    update_record(folder, history=[{"tokens": 5}, {"after": {"ce": 1.0}}], evaluation=[text, task])
    card, _ = card_of(folder)
    assert "| perplexity, a book | all | 9.00 |  | 5 tokens |" in card.text
    assert "Uptrained (heal) on 5 tokens of unrecorded data." in card.text
    assert [result.metric_type for result in card.data.eval_results] == ["perplexity"]


def test_what_an_older_version_did_not_record_is_left_out(folder):
    """An empty record: no figure is invented, and the licence is asked for."""
    (folder / "recursify.json").write_text("{}", encoding="utf-8")
    card, warnings = card_of(folder)
    assert "This model has not been evaluated." in card.text
    assert card.text.count("not recorded") == 3
    assert card.data.eval_results is None
    assert "license" not in card.data.to_dict()
    assert warnings == ["The license of the dense model is not recorded. Look it up, and pass it with --license."]


def test_cards_of_dense_models_are_read_as_they_are_written(tmp_path):
    """Several licences are none in particular; the code of Norwegian is a truth value in YAML."""
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: [mit, apache-2.0]\nlanguage: [no, en]\n---\n", encoding="utf-8")
    assert origin_of_folder("org/dense", tmp_path) == Origin("org/dense", license="other", languages=("no", "en"))
    card.write_text("---\nlicense: [mit]\nlanguage: no\n---\n", encoding="utf-8")
    assert origin_of_folder(str(tmp_path), tmp_path) == Origin(license="mit", languages=("no",))
    card.write_text("---\n: :\n- [\n---\n", encoding="utf-8")
    assert origin_of_folder(str(tmp_path), tmp_path) == Origin()


@pytest.mark.parametrize(
    ("origin", "messages"),
    [
        (Origin(license="mit"), []),
        (Origin(license="cc-by-nc-nd-4.0"), ["forbids sharing derivatives", "forbids commercial use"]),
        (Origin(license="llama3.2"), ["'Built with Llama'"]),
        (
            Origin(license="other", license_name="acme", license_link="https://x"),
            ["acme (https://x), is a custom one"],
        ),
    ],
)
def test_license_warnings(origin, messages):
    """By the Hub's identifiers."""
    found = license_warnings(origin)
    assert len(found) == len(messages)
    assert all(message in warning for message, warning in zip(messages, found, strict=True))


def test_the_card_names_the_oldest_transformers_that_is_supported():
    """The same as pyproject.toml."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"transformers>={MINIMUM_TRANSFORMERS},<6" in project["dependencies"]
