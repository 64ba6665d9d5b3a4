"""Settings of engines: ranges, unknown keys, and how an engine takes them."""

from dataclasses import fields
from itertools import pairwise

import pytest

from helpers.small_engine import SMALL, prompts, recursive, small_engine
from helpers.tiny_models import byte_tokenizer
from recursify.engine import Engine, EngineConfig, SamplingParams
from recursify.errors import CheckpointError, EngineError, RecursifyError, SettingsError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be a whole number of at least 1, got 0"),
        ({"page_size": -1}, "page_size must be a whole number of at least 1, got -1"),
        ({"num_pages": 0}, "num_pages must be a whole number of at least 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1, got 0"),
        ({"max_model_len": 0}, "max_model_len must be a whole number of at least 1, got 0"),
        ({"num_device_steps": 0}, "num_device_steps must be a whole number of at least 1, got 0"),
        (
            {"max_num_batched_tokens": 4, "max_num_seqs": 4},
            r"max_num_batched_tokens \(4\) must be more than max_num_seqs \(4\)",
        ),
    ],
)
def test_values_out_of_range(options, message):
    """A config is checked by itself, before there is a model."""
    with pytest.raises(EngineError, match=message):
        EngineConfig(**options)


def test_engine_takes_a_config_or_its_fields():
    """Both make the same engine; an unknown field is an error that names the nearest one."""
    model = recursive()
    config = EngineConfig(**SMALL)
    assert Engine(model, None, config).config == small_engine(model).config == config
    with pytest.raises(EngineError, match="Unknown setting 'max_requests'"):
        Engine(model, max_requests=3)
    with pytest.raises(SettingsError, match="Got settings and also page_size"):
        Engine(model, None, config, page_size=4)


def test_every_setting_is_documented():
    """Each field is followed by a string, which is also the help text of an option."""
    import ast
    import inspect
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(EngineConfig))).body[0].body
    documented = {
        field.target.id
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    assert documented == {field.name for field in fields(EngineConfig)}


def test_from_pretrained(tmp_path):
    """Model and tokenizer of a folder, and the errors of what cannot be loaded."""
    model = recursive()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    engine = Engine.from_pretrained(str(tmp_path), dtype="float32", **SMALL)
    assert engine.config == EngineConfig(**SMALL)
    params = SamplingParams(max_tokens=4)
    expected = small_engine(model).generate(prompts(5), params)[0].token_ids
    assert engine.generate(prompts(5), params)[0].token_ids == expected
    assert engine.generate(["Once"], params)[0].text
    with pytest.raises(EngineError, match="page_size must be a whole number of at least 1"):
        Engine.from_pretrained(tmp_path, page_size=0)
    with pytest.raises(CheckpointError):
        Engine.from_pretrained(tmp_path / "missing")


@pytest.mark.parametrize("source", ["smollm2-healed", "folder"])
def test_a_path_is_not_a_model(source):
    """One error that says how to load it."""
    with pytest.raises(RecursifyError, match=rf"takes a loaded model.*Engine\.from_pretrained\('{source}'\)"):
        Engine(source)
