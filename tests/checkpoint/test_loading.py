"""``load_model``: whatever the source is, a model in eval mode with its tokenizer."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from helpers.tiny_models import convert_tiny
from recursify.checkpoint.description import inspect_model
from recursify.checkpoint.loading import load_model, require_exit, require_recursive
from recursify.convert.export import export_model
from recursify.errors import CheckpointError, SettingsError


@pytest.fixture(scope="module")
def recursive(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading") / "recursive"
    convert_tiny(tiny_llama, folder, lora_rank=4)
    return folder


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_dense_and_recursive_models_load(tiny_llama, recursive, kind):
    """With their tokenizers, in the dtype asked for."""
    for folder, family in ((tiny_llama, "llama"), (recursive, "recursive")):
        for dtype in ("auto", "bfloat16"):
            model, tokenizer = load_model(kind(folder), dtype=dtype)
            assert model.config.model_type == family
            assert model.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
            assert not model.training
            assert tokenizer.decode(tokenizer("abc")["input_ids"]) == "abc"


def test_other_numbers_of_recursions(tiny_llama, recursive):
    """Of recursive models only."""
    assert load_model(recursive, recursions=3)[0].config.num_recursions == 3
    with pytest.raises(SettingsError, match="is a dense model, and this needs a recursive one"):
        load_model(tiny_llama, recursions=3)
    with pytest.raises(SettingsError, match="0"):
        load_model(recursive, recursions=0)


def test_what_does_not_load(recursive, tmp_path):
    """An unknown dtype, a missing device and a damaged folder."""
    with pytest.raises(SettingsError, match=r"Unknown dtype 'int4'\. Use one of: auto, float32"):
        load_model(recursive, dtype="int4")
    with pytest.raises(SettingsError, match="Cannot run on 'nowhere'"):
        load_model(recursive, device="nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "recursive"}')
    with pytest.raises(CheckpointError, match="does not load"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_recursions", "two", r"config.num_recursions is 'two', which is not int\. Correct it in config.json"),
        ("num_hidden_layers", "six", r"'num_hidden_layers' expected int, got str \(value: 'six'\)"),
    ],
)
@pytest.mark.parametrize("read", [load_model, inspect_model, lambda folder: export_model(folder, folder / "out")])
def test_a_field_of_a_wrong_type(recursive, tmp_path, read, field, value, message):
    """Field, value and what to do, in one error, however the folder is read."""
    folder = shutil.copytree(recursive, tmp_path / "recursive")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(CheckpointError, match=message):
        read(folder)


def test_requirements(tiny_llama, recursive, tmp_path):
    """Each with what to do."""
    assert require_recursive(str(recursive)) == recursive
    with pytest.raises(CheckpointError, match=r"is not a recursive model .*recursify convert .* -o OUTPUT"):
        require_recursive(tiny_llama)
    with pytest.raises(CheckpointError, match="There is no model folder at"):
        require_recursive(tmp_path / "nowhere")
    with pytest.raises(
        SettingsError, match=r"has exits after depths 0, so none at --depth 1\. Omit --depth for full depth"
    ):
        require_exit(load_model(recursive)[0].config, recursive, 1)
