"""Command-line options made from settings classes: every field is an option and a key of the ``--config`` file."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from recursify.errors import SettingsError
from recursify.settings import Option, Settings, check_keys, constraints, describe, read_settings

METAVARS = {int: "<int>", float: "<float>", str: "<str>", Path: "<path>"}


def options_from_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Replace every parameter of ``command`` that is a settings class by the options of its fields.

    ``--config FILE`` is added: a YAML file with any of these fields; options on the command line take precedence.
    """
    signature = inspect.signature(command, eval_str=True)
    kinds: dict[str, type[Settings]] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, Settings)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name in kinds:
            parameters += settings_parameters(kinds[name])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    config = typer.Option("--config", metavar="FILE", help="YAML file with any of these settings; options win.")
    parameters.append(_parameter("config", Annotated[Path | None, config]))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        names = {field for kind in kinds.values() for field in kind.__pydantic_fields__}
        given = {name: values.pop(name) for name in names}
        settings = read_options(kinds, {k: v for k, v in given.items() if v not in (None, [])}, values.pop("config"))
        command(**values, **settings)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {}
    return run


def read_options(kinds: dict[str, type[Settings]], given: dict[str, Any], config: Path | None) -> dict[str, Settings]:
    """Settings objects by parameter name, from the command line and a YAML file.

    Raises:
        SettingsError: Unknown key in the file, or an invalid value.
    """
    source = None if config is None else f"'{config}'"
    from_file = {} if config is None else read_settings(config)
    check_keys(from_file, [name for kind in kinds.values() for name in kind.__pydantic_fields__], source)
    settings = {}
    for parameter, kind in kinds.items():
        fields = kind.__pydantic_fields__
        options = {name: _value(name, field, given[name]) for name, field in fields.items() if name in given}
        merged = {name: value for name, value in from_file.items() if name in fields} | options
        labels = {name: option_names(name, fields[name])[0] for name in options}
        settings[parameter] = kind.from_mapping(merged, source, labels)
    return settings


def settings_parameters(settings: type[Settings]) -> Iterator[inspect.Parameter]:
    """Parameters with a typer option for every field of a settings class, panel by panel."""
    for name, panel in _panels(settings):
        field = settings.__pydantic_fields__[name]
        option, (container, kind) = _option(field), _types(field)
        names = option_names(name, field)
        if kind is bool and field.default is not False:
            names = [f"{names[0]}/--no-{names[0].removeprefix('--')}", *names[1:]]
        info = typer.Option(
            *names,
            metavar=None if kind is bool else option.metavar or _metavar(field),
            help=help_text(field),
            show_default=False,
            envvar=option.env,
            rich_help_panel=panel,
        )
        form = bool | None if kind is bool else list[str] | None if container else str | None
        yield _parameter(name, Annotated[form, info])


def _panels(kind: type[Settings]) -> list[tuple[str, str | None]]:
    """Fields and their panels, in the order of ``kind.panels``: inherited fields come first in a dataclass."""
    panel, pairs = None, []
    for name in kind.__pydantic_fields__:
        panel = kind.panels.get(name, panel)
        pairs.append((name, panel))
    order = [None, *kind.panels.values()]
    return sorted(pairs, key=lambda pair: order.index(pair[1]))


def option_names(name: str, field: FieldInfo) -> list[str]:
    """Names of a field's option, the long one first."""
    return list(_option(field).names) or [f"--{name.replace('_', '-')}"]


def help_text(field: FieldInfo) -> str:
    """Documentation of a field, with its default and range."""
    text = " ".join((field.description or "").split())
    container, kind = _types(field)
    if container:
        text += " Repeatable."
    default = field.default
    notes = [] if default in (None, PydanticUndefined, ()) or default is False else [f"default: {_shown(default)}"]
    if kind in (int, float) and not container:
        allowed = re.sub("^a (whole )?number ?(of )?", "", describe(field.annotation, field.metadata))
        notes += [allowed] if allowed else []
    return f"{text} [{'; '.join(notes)}]" if notes else text


def _shown(default: Any) -> str:
    if default is True:
        return "on"
    return ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option(field: FieldInfo) -> Option:
    _, metadata = constraints(field.annotation, field.metadata)
    return next((entry for entry in metadata if isinstance(entry, Option)), Option())


def _types(field: FieldInfo) -> tuple[Any, Any]:
    """Container of a field's values (``tuple``, ``dict``, or None for a single value), and the type of each."""
    kind, _ = constraints(field.annotation, field.metadata)
    container = typing.get_origin(kind)
    if container not in (tuple, dict):
        return None, kind
    return container, constraints(typing.get_args(kind)[0])[0]


def _metavar(field: FieldInfo) -> str:
    container, kind = _types(field)
    if container is dict:
        return "KEY=VALUE"
    if typing.get_origin(kind) is Literal:
        return f"[{'|'.join(typing.get_args(kind))}]"
    return METAVARS.get(kind, "<str>")


def _value(name: str, field: FieldInfo, value: Any) -> Any:
    """Value of an option as a YAML file would have it: pairs become a mapping, ``none`` becomes None.

    Raises:
        SettingsError: Text that is not a pair.
    """
    container, kind = _types(field)
    if container is dict:
        import yaml

        pairs = [pair.partition("=") for pair in value]
        if malformed := [key for key, sign, _ in pairs if not (key and sign)]:
            raise SettingsError(f"{option_names(name, field)[0]} takes KEY=VALUE, got '{malformed[0]}'.")
        return {key: yaml.safe_load(text) for key, _, text in pairs}
    if value == "none" and type(None) in typing.get_args(field.annotation):
        return None
    return [_number(kind, text) for text in value] if container else _number(kind, value)


def _number(kind: Any, text: Any) -> Any:
    """Number that ``text`` stands for if ``kind`` is a number; other text is left to the settings class."""
    try:
        return kind(text) if kind in (int, float) and isinstance(text, str) else text
    except ValueError:
        return text
