"""Origin and licence of a dense model, read from its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Origin:
    """Origin of a dense model, entry ``base`` of ``recursify.json``; a field that its files do not state is None.

    Attributes:
        hub_id: Hub id.
        license: Identifier of the licence on the Hub (``apache-2.0``, ``llama3.2``, ``other``).
        license_name: Name of the licence if ``license`` is ``other``.
        license_link: Link to the licence if ``license`` is ``other``.
        languages: ISO codes of the languages.
    """

    hub_id: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> Origin:
        """Read an entry of ``recursify.json``, or the front matter of a model card."""
        languages = mapping.get("languages", mapping.get("language"))
        listed = languages if isinstance(languages, list | tuple) else [languages]
        stated = {key: mapping.get(key) for key in ("license", "license_name", "license_link")}
        # A card may list several licences, none of which alone is the licence.
        stated = {key: "other" if isinstance(text, list) and len(text) > 1 else text for key, text in stated.items()}
        return cls(
            hub_id=mapping.get("hub_id"),
            # YAML reads the code of Norwegian, no, as a boolean.
            languages=tuple("no" if code is False else str(code) for code in listed if code is not None),
            **{key: str(text[0] if isinstance(text, list) else text) for key, text in stated.items() if text},
        )


def origin_of_folder(source: str, folder: Path) -> Origin:
    """Read the model card of a Hugging Face folder; ``source`` is the name that the user gave."""
    is_hub_id = not Path(source).exists() and source.count("/") == 1
    return Origin.from_mapping({**_front_matter(folder / "README.md"), "hub_id": source if is_hub_id else None})


def _front_matter(card: Path) -> dict[str, Any]:
    """YAML at the head of a model card; empty if there is none or it cannot be read."""
    try:
        opening, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
        loaded = None if opening.strip() else yaml.safe_load(rest.partition("\n---")[0])
    except (FileNotFoundError, yaml.YAMLError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
