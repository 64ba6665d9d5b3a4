"""Settings classes: conversion of values, errors, and one set of names in fields, YAML keys and options."""

from __future__ import annotations

import dataclasses
import pickle
import typing
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import PositiveFloat, PositiveInt

import recursify
from helpers.command_line import run
from recursify.checkpoint.generation_defaults import GenerationDefaults
from recursify.cli.app import COMMANDS, app
from recursify.cli.from_settings import help_text, option_names
from recursify.errors import EngineError, SettingsError
from recursify.settings import Fractions, Option, Settings, Strings, constraints, resolve_settings


def settings_of(command: str) -> list[type[Settings]]:
    """Settings classes that the options of a command are made from."""
    hints = typing.get_type_hints(own_function(command))
    return [kind for kind in hints.values() if isinstance(kind, type) and issubclass(kind, Settings)]


def own_function(command: str) -> Callable[..., None]:
    function = import_module(f"recursify.cli.{command.replace('-', '_')}").command
    return getattr(function, "__wrapped__", function)


SETTINGS = {command: settings_of(command) for command in COMMANDS}


class Example(Settings):
    """Settings of the tests."""

    count: PositiveInt = 3
    """Number of things."""
    rate: PositiveFloat | None = None
    """Rate of things."""
    files: Annotated[Strings | None, Option("--file", "-f")] = None
    """Files to read."""
    parts: Fractions = ()
    """Fractions of things."""
    kind: Literal["old", "new"] = "old"
    """Kind of thing."""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further options."""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rate": "3e-4"}, 3e-4),  # YAML reads a number without a dot as a string
        ({"count": "4"}, 4),
        ({"files": "a.txt"}, ("a.txt",)),
        ({"files": ["a.txt", "b.txt"]}, ("a.txt", "b.txt")),
        ({"parts": 0.5}, (0.5,)),
        ({"parts": [1, "0.5"]}, (1.0, 0.5)),
        ({"extra": {"a": 1}}, {"a": 1}),
    ],
)
def test_values_are_converted(given, expected):
    """The same by keyword and from a mapping."""
    (name,) = given
    assert getattr(Example(**given), name) == expected
    assert getattr(Example.from_mapping(given), name) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coun": 3}, r"Unknown setting 'coun'\. Did you mean 'count'\?$"),
        ({"zzz": 3}, r"Unknown setting 'zzz'\. Known keys: count, rate, files, parts, kind, extra\.$"),
        ({"count": 0}, r"count must be a whole number of at least 1, got 0\.$"),
        ({"count": 1.5}, r"count must be a whole number of at least 1, got 1\.5\.$"),
        ({"count": None}, r"count must be a whole number of at least 1, got None\.$"),
        ({"rate": "fast"}, r"rate must be a number above 0, got 'fast'\.$"),
        ({"parts": [0, 2]}, r"parts must be a list whose entries are each a number of at least 0 and at most 1, got 2"),
        ({"kind": "newer"}, r"Unknown kind 'newer'\. Use one of: old, new\.$"),
        ({"extra": 3}, r"extra must be a mapping, got 3\.$"),
    ],
)
def test_errors(given, message):
    """One line with the name, the value and the values allowed."""
    with pytest.raises(SettingsError, match=message):
        Example(**given)
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(Example(), **given)


def test_errors_name_their_source():
    """A file, or the option."""
    with pytest.raises(SettingsError, match=r"count in 's\.yaml' must be a whole number of at least 1, got 0\.$"):
        Example.from_mapping({"count": 0}, "'s.yaml'")
    with pytest.raises(SettingsError, match=r"Unknown key 'coun' in 's\.yaml'\. Did you mean 'count'"):
        Example.from_mapping({"coun": 0}, "'s.yaml'")
    with pytest.raises(SettingsError, match=r"--count must be a whole number"):
        Example.from_mapping({"count": 0}, "'s.yaml'", {"count": "--count"})


def test_error_class():
    """A class may raise another of our errors."""

    class Limits(Settings, error=EngineError):
        """Limits of the test."""

        limit: PositiveInt = 1
        """Limit."""

    with pytest.raises(EngineError, match="limit must be a whole number of at least 1, got 0"):
        Limits(limit=0)


def test_inheritance():
    """A derived class has the fields of its base, with their help texts."""

    class Derived(Example):
        """Settings derived in the test."""

        more: bool = False
        """More things."""

    assert Derived.__pydantic_fields__["count"].description == "Number of things."
    assert Derived(more="yes", count=2) != Derived(more=True)
    with pytest.raises(SettingsError, match="count must be a whole number"):
        Derived(count=0)


def test_dataclass_tools():
    """Instances are frozen, comparable and hashable data, and pickle."""
    example = Example(count=4, files="a")
    assert pickle.loads(pickle.dumps(example)) == example
    assert dataclasses.replace(example, count=5).count == 5
    assert example.to_dict() == {**dataclasses.asdict(example), "files": ["a"], "parts": []}
    with pytest.raises(dataclasses.FrozenInstanceError):
        example.count = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Example(3)  # type: ignore[misc]


def test_resolve_settings():
    """An object or keywords, not both."""
    assert resolve_settings(Example, None, {"count": 2}) == Example(count=2)
    assert resolve_settings(Example, Example(), {}) == Example()
    with pytest.raises(SettingsError, match="Got settings and also count"):
        resolve_settings(Example, Example(), {"count": 2})
    with pytest.raises(SettingsError, match="settings must be Example, got dict"):
        resolve_settings(Example, {"count": 2}, {})  # type: ignore[arg-type]


def test_every_settings_class_belongs_to_a_command():
    """No class of the package is left out of the tests below, except of requests, of files, and bases of others."""
    for command in COMMANDS:
        import_module(f"recursify.cli.{command.replace('-', '_')}")
    known = {kind for kinds in SETTINGS.values() for kind in kinds} | {recursify.SamplingParams, GenerationDefaults}
    assert known >= {kind for kind in leaves(Settings) if kind.__module__.startswith("recursify.")}
    assert {command for command, kinds in SETTINGS.items() if not kinds} == {"inspect", "export"}


def leaves(kind: type) -> Iterator[type]:
    for derived in kind.__subclasses__():
        yield from leaves(derived) if derived.__subclasses__() else [derived]


@pytest.mark.parametrize("command", COMMANDS)
def test_options_keys_and_fields_are_one_set(command):
    """Every field is an option and a key of ``--config``, and every option not of the command itself is a field."""
    fields = {name for kind in SETTINGS[command] for name in dataclass_fields(kind)}
    parameters = {
        parameter.name: parameter for parameter in typer.main.get_command(app).commands[command].load().params
    }
    own = set(own_function(command).__annotations__) - {"return"} | {"config", "help"}
    assert fields <= set(parameters)
    assert set(parameters) - fields <= own
    for kind in SETTINGS[command]:
        for name, field in kind.__pydantic_fields__.items():
            assert parameters[name].opts == option_names(name, field)
            assert parameters[name].help == help_text(field)


def dataclass_fields(kind: type[Settings]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("kind", [kind for kinds in SETTINGS.values() for kind in kinds])
def test_fields_are_documented(kind):
    """Every field has a help text that opens with a capital letter; every panel begins with a field."""
    for name, field in kind.__pydantic_fields__.items():
        assert field.description, name
        assert field.description[0].isupper(), name
        assert field.description.rstrip().endswith("."), name
    assert set(kind.panels) <= set(kind.__pydantic_fields__)


def test_every_key_can_be_given_in_a_file(tmp_path, capsys):
    """A file with every field of a conversion, at its default, is read; a flag takes precedence."""
    import yaml

    file = tmp_path / "settings.yaml"
    defaults = recursify.ConversionSettings().to_dict()
    file.write_text(yaml.safe_dump({**defaults, "num_recursions": 3}))
    assert run("convert", "nowhere", "--dry-run", "--config", file, "--device", "warp") == 1
    assert "Cannot run on 'warp'" in capsys.readouterr().err
    file.write_text(yaml.safe_dump({**defaults, "num_recursions": 0}))
    assert run("convert", "nowhere", "--dry-run", "--config", file) == 1
    assert f"num_recursions in '{file}' must be a whole number of at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "registry", "kind", "field"),
    [
        ("recursify.modeling", "SHARINGS", "ConversionSettings", "sharing"),
        ("recursify.modeling", "EXIT_HEADS", "UptrainSettings", "exit_head"),
        ("recursify.modeling", "ROUTERS", "UptrainSettings", "router"),
        ("recursify.modeling", "ROUTER_WIDTHS", "UptrainSettings", "router_width"),
        ("recursify.modeling", "ROUTER_GATES", "UptrainSettings", "router_gate"),
        ("recursify.modeling", "ROUTED_KV", "UptrainSettings", "router_kv"),
        ("recursify.modeling", "ROUTER_DECISIONS", "UptrainSettings", "router_decision"),
        ("recursify.modeling.configuration_recursive", "ROUTER_ACTIVATIONS", "UptrainSettings", "router_activation"),
    ],
)
def test_choices_are_those_of_the_model(module, registry, kind, field):
    """The settings list the names that modeling implements, which they do not import: ``--help`` is quick."""
    entry = getattr(recursify, kind).__pydantic_fields__[field]
    choices, _ = constraints(entry.annotation, entry.metadata)
    assert choices.__args__ == tuple(getattr(import_module(module), registry))


def test_named_strategies_are_documented():
    """Help texts list every built-in initialization and relaxation, and the built-in stages."""
    from recursify.convert.initialization import INITIALIZATIONS
    from recursify.convert.relaxation import RELAXATIONS
    from recursify.uptrain.run import STAGES

    fields = recursify.ConversionSettings.__pydantic_fields__
    assert all(name in fields["initialization"].description for name in INITIALIZATIONS)
    assert all(name in fields["relaxation"].description for name in RELAXATIONS)
    assert all(f"{name}:" in recursify.UptrainSettings.__pydantic_fields__["stage"].description for name in STAGES)


def test_defaults_of_commands_are_those_of_the_functions():
    """An option that a command passes on to a function of the front door has the function's default."""
    verbs = {
        "perplexity": "evaluate_model",
        "eval": "evaluate_tasks",
        "calibrate-exits": "calibrate_exits",
        "generate": "generate_text",
        "export": "export_model",
        "push": "push_model",
        "convert": "convert_model",
        "uptrain": "uptrain_model",
        "serve": "serve_model",
        "bench": "benchmark_model",
    }
    import inspect

    group = typer.main.get_command(app)
    for command, verb in verbs.items():
        signature = inspect.signature(getattr(recursify, verb))
        fields = {name: field for kind in SETTINGS[command] for name, field in kind.__pydantic_fields__.items()}
        for parameter in group.commands[command].load().params:
            default = fields.get(parameter.name, parameter).default
            known = signature.parameters.get(parameter.name)
            if known is not None and known.default is not known.empty:
                assert (default or None) == (known.default or None), f"{command} --{parameter.name}"
