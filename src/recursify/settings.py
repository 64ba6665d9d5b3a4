"""Settings classes: name, type, range, default and help text of an option, written once.

A subclass of :class:`Settings` is a frozen dataclass with keyword arguments. Its annotations convert and check the
values, a YAML file has the same names, and :mod:`recursify.cli.from_settings` makes command-line options of its fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, dataclass_transform

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from recursify.errors import RecursifyError, SettingsError

if TYPE_CHECKING:
    import torch


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | int | float) else value


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""Strings; a single one may be given alone."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Dtype of weights; ``auto`` is the checkpoint's."""
Fraction = Annotated[float, Ge(0), Le(1)]
"""Number from 0 to 1."""
PositiveFraction = Annotated[float, Gt(0), Le(1)]
"""Number above 0, at most 1."""
Fractions = Annotated[tuple[Fraction, ...], BeforeValidator(_as_tuple)]
"""Numbers from 0 to 1; a single one may be given alone."""


@dataclass(frozen=True, init=False)
class Option:
    """Annotation of a field whose command-line option is not ``--field-name``.

    Attributes:
        names: Option names, ``("--output", "-o")`` for example; empty for ``--field-name``.
        metavar: Placeholder of the value in ``--help``; None derives it from the type.
        env: Environment variable that gives the value.
    """

    names: tuple[str, ...]
    metavar: str | None
    env: str | None

    def __init__(self, *names: str, metavar: str | None = None, env: str | None = None) -> None:
        for name, value in {"names": names, "metavar": metavar, "env": env}.items():
            object.__setattr__(self, name, value)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
class Settings:
    """Base of settings: every subclass becomes a frozen, strict, keyword-only dataclass.

    The string under a field is its help text. An unknown name, a value of the wrong type and one out of range raise the
    class keyword ``error``, by default :class:`~recursify.errors.SettingsError`.

    Attributes:
        panels: Titles of the panels of ``--help``, by the name of the field that each begins with.
        error: Class of the error for invalid values.
    """

    panels: ClassVar[Mapping[str, str]] = {}
    error: ClassVar[type[RecursifyError]]
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    __pydantic_fields__: ClassVar[dict[str, FieldInfo]]
    __pydantic_validator__: ClassVar[Any]

    def __init_subclass__(cls, error: type[RecursifyError] = SettingsError, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.error = error
        config = ConfigDict(use_attribute_docstrings=True, extra="forbid", arbitrary_types_allowed=True)
        pydantic_dataclass(frozen=True, kw_only=True, config=config)(cls)
        for name, field in cls.__pydantic_fields__.items():  # pydantic reads the docstrings of one class alone
            inherited = [vars(base).get("__pydantic_fields__", {}).get(name) for base in cls.__mro__[1:]]
            field.description = field.description or next((entry.description for entry in inherited if entry), None)
        construct = cls.__init__

        def __init__(self: Any, **values: Any) -> None:
            try:
                construct(self, **values)
            except ValidationError as invalid:
                raise _error(cls, invalid) from None

        cls.__init__ = __init__  # type: ignore[method-assign]

    @classmethod
    def from_mapping(
        cls, mapping: Mapping[str, Any], where: str | None = None, labels: Mapping[str, str] | None = None
    ) -> Self:
        """Settings from a mapping, of a YAML file for example.

        Args:
            mapping: Values by field name.
            where: Source for messages, ``'uptrain.yaml'`` for example.
            labels: Names for messages, ``--length`` for example, by field name.

        Raises:
            RecursifyError: Unknown key (the message names the nearest one), or an invalid value.
        """
        try:
            return cls.__pydantic_validator__.validate_python({str(key): value for key, value in mapping.items()})
        except ValidationError as invalid:
            raise _error(cls, invalid, where, labels) from None

    def to_dict(self) -> dict[str, Any]:
        """Values by field name, as JSON has them: tuples become lists."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }


class ExitOptions(Settings):
    """Early exit, as options of several commands."""

    exit_policy: Annotated[str | None, Option("--exit")] = None
    """Exit policy: head, confidence, entropy, saturation, convergence, divergence, fixed (at the depth that the
    threshold names) or oracle (a simulation, which the engine does not run). Early exit changes the output. Without it,
    every token runs all recursions."""
    threshold: float | None = None
    """Confidence above which tokens exit. Without it, the calibrated threshold, else the policy's."""
    min_depth: Annotated[int, Ge(0)] = 0
    """First depth after which tokens may exit."""


class SamplingOptions(Settings):
    """Sampling, as options of several commands."""

    temperature: Annotated[float, Ge(0)] | None = None
    """Sampling temperature; 0 is greedy. Without it, the model's own (generation_config.json), else greedy."""
    top_p: PositiveFraction | None = None
    """Probability mass of the most likely tokens to sample from. Without it, the model's own, else all."""
    top_k: Annotated[int, Ge(0)] | None = None
    """Number of most likely tokens to sample from; 0 keeps all. Without it, the model's own, else all."""
    min_p: Fraction | None = None
    """Least probability of a token to sample, relative to that of the most likely one. Without it, the model's own."""
    repetition_penalty: Annotated[float, Gt(0)] | None = None
    """Penalty of tokens that have occurred; 1 is none. Without it, the model's own."""
    seed: int = 0
    """Seed for sampling."""


S = TypeVar("S", bound=Settings)


def resolve_settings(kind: type[S], settings: S | None, options: Mapping[str, Any]) -> S:
    """``settings`` if given, else a ``kind`` made of ``options``: the arguments of every public function.

    Raises:
        SettingsError: Both are given, or an option is unknown or invalid.
    """
    if settings is None:
        return kind(**options)
    if not isinstance(settings, kind):
        raise SettingsError(f"settings must be {kind.__name__}, got {type(settings).__name__}.")
    if options:
        raise SettingsError(f"Got settings and also {', '.join(options)}. Pass all of them in the settings.")
    return settings


def check_keys(
    mapping: Iterable[Any], known: Iterable[str], where: str | None, error: type[RecursifyError] = SettingsError
) -> None:
    """Refuse a key that is not ``known``.

    Raises:
        RecursifyError: The message contains the key, its source, and the nearest known key.
    """
    known = list(known)
    for key in mapping:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"Did you mean '{nearest[0]}'?" if nearest else f"Known keys: {', '.join(known)}."
            subject = f"key '{key}' in {where}" if where else f"setting '{key}'"
            raise error(f"Unknown {subject}. {hint}")


def read_settings(file: Path) -> dict[str, Any]:
    """Mapping in a YAML file.

    Raises:
        SettingsError: Missing file, invalid YAML, or not a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"Cannot read settings from '{file}': {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"'{file}' must contain a mapping of settings, found {type(content).__name__}.")
    return content


def require_device(device: str) -> torch.device:
    """Device called ``device``.

    Raises:
        SettingsError: Unknown name, or not available on this machine.
    """
    import torch

    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"Cannot run on '{device}': {str(error).splitlines()[0]}") from error
    return place


def constraints(annotation: Any, metadata: tuple[Any, ...] | list[Any] = ()) -> tuple[Any, list[Any]]:
    """Bare type and all metadata of an annotation; ``X | None`` counts as ``X``."""
    more = list(metadata)
    while True:
        if typing.get_origin(annotation) is Annotated:
            annotation, *inner = typing.get_args(annotation)
            more += inner
        elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
            kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
            if len(kinds) > 1:
                return annotation, more
            (annotation,) = kinds
        else:
            return annotation, more


def describe(annotation: Any, metadata: tuple[Any, ...] | list[Any] = ()) -> str:
    """Noun phrase for the values that a type allows; a string in its metadata takes precedence."""
    kind, metadata = constraints(annotation, metadata)
    for entry in metadata:
        if isinstance(entry, str):
            return entry
    if typing.get_origin(kind) is Literal:
        return f"one of: {', '.join(str(value) for value in typing.get_args(kind))}"
    if typing.get_origin(kind) is tuple:
        return f"a list whose entries are each {describe(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is dict:
        values = typing.get_args(kind)[1]
        return "a mapping" if values is Any else f"a mapping whose values are each {describe(values)}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    noun = names.get(kind, str(getattr(kind, "__name__", kind)))
    return " ".join([noun, *_range(kind, metadata)])


def _range(kind: Any, metadata: list[Any]) -> Iterator[str]:
    words = []
    for entry in metadata:
        match entry:
            case Ge(ge):
                words.append(f"at least {ge}")
            case Gt(gt):
                words.append(f"at least {gt + 1}" if kind is int else f"above {gt}")  # type: ignore[operator]
            case Le(le):
                words.append(f"at most {le}")
            case Lt(lt):
                words.append(f"below {lt}")
    if words:
        yield f"of {' and '.join(words)}" if words[0].startswith("at") else " and ".join(words)


def _error(
    cls: type[Settings], invalid: ValidationError, where: str | None = None, labels: Mapping[str, str] | None = None
) -> RecursifyError:
    """One line on the first invalid value: name, source, value, and the values allowed."""
    found = invalid.errors(include_url=False)[0]
    name, value = str(found["loc"][0]), found["input"]
    field = cls.__pydantic_fields__.get(name)
    if field is None:
        check_keys([name], cls.__pydantic_fields__, where, cls.error)
    source = f" in {where}" if where else ""
    label = (labels or {}).get(name, f"{name}{source}")
    if found["type"] == "missing":
        return cls.error(f"{label} is missing.")
    if found["type"] == "value_error":
        return cls.error(f"{label}: {found['ctx']['error']}")
    assert field is not None
    kind, _ = constraints(field.annotation, field.metadata)
    if typing.get_origin(kind) is Literal:
        return cls.error(f"Unknown {label} '{value}'. Use {describe(kind)}.")
    shown = repr(value) if field.repr else "another value"
    return cls.error(f"{label} must be {describe(field.annotation, field.metadata)}, got {shown}.")
