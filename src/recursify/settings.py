"""Strict reading of settings: an unknown key is an error that names the nearest one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from recursify.errors import SettingsError

if TYPE_CHECKING:
    import torch


class FromMapping(Protocol):
    """Settings that read a mapping strictly."""

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any], where: str) -> Self: ...


Settings = TypeVar("Settings", bound=FromMapping)


def resolve_settings(kind: type[Settings], settings: Settings | None, options: dict[str, Any]) -> Settings:
    """``settings`` if given, else a ``kind`` made of ``options``: the arguments of every public function.

    Raises:
        SettingsError: Both are given, or an option is unknown or out of range.
    """
    if settings is None:
        return kind.from_mapping(options, "the options")
    if options:
        raise SettingsError(f"Got settings and also {', '.join(options)}. Pass all of them in the settings.")
    return settings


def read_settings(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        SettingsError: It is missing, no YAML, or no mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"Cannot read settings from '{file}': {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"'{file}' must hold a mapping of settings, found {type(content).__name__}.")
    return content


def check_keys(mapping: Iterable[Any], known: Iterable[str], where: str) -> None:
    """Refuse a key that is not ``known``.

    Raises:
        SettingsError: The message names the key, ``where`` it stands, and the nearest known one.
    """
    known = list(known)
    for key in mapping:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"Did you mean '{nearest[0]}'?" if nearest else f"Known keys: {', '.join(known)}."
            raise SettingsError(f"Unknown key '{key}' in {where}. {hint}")


def require_device(device: str) -> torch.device:
    """The device called ``device``.

    Raises:
        SettingsError: There is none on this machine.
    """
    import torch

    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"Cannot run on '{device}': {str(error).splitlines()[0]}") from error
    return place
