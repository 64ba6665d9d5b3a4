"""Where a dense model comes from, and under which licence, as far as its files say."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Origin:
    """The dense model behind a recursive one; what its files do not say is None.

    Attributes:
        hub_id: What the Hub calls it.
        license: The licence's identifier on the Hub (``apache-2.0``, ``llama3.2``, ``other``).
        license_name: Of a licence that is ``other``.
        license_link: Where that is to be read.
        languages: ISO codes.
    """

    hub_id: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As ``recursify.json`` has it."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> Origin:
        """From ``recursify.json``, or from the front matter of a model card."""
        languages = mapping.get("languages", mapping.get("language"))
        listed = languages if isinstance(languages, list | tuple) else [languages]
        said = {key: mapping.get(key) for key in ("license", "license_name", "license_link")}
        # A card may list several licences; the first is no more the licence than the second.
        said = {key: "other" if isinstance(text, list) and len(text) > 1 else text for key, text in said.items()}
        return cls(
            hub_id=mapping.get("hub_id"),
            # YAML reads the code of Norwegian, no, as a truth value.
            languages=tuple("no" if code is False else str(code) for code in listed if code is not None),
            **{key: _one(text) for key, text in said.items() if text},
        )


def _one(text: Any) -> str:
    return str(text[0] if isinstance(text, list) else text)


def origin_of_folder(source: str, folder: Path) -> Origin:
    """What a Hugging Face folder says in its model card; ``source`` is what the user called it."""
    is_hub_id = not Path(source).exists() and source.count("/") == 1
    return Origin.from_mapping({**_front_matter(folder / "README.md"), "hub_id": source if is_hub_id else None})


def origin_of_gguf(file: Path, hub_id: str | None) -> Origin:
    """What a ``.gguf`` says in its metadata."""
    from gguf import GGUFReader

    fields = GGUFReader(str(file)).fields
    names = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
        "languages": "general.languages",
    }
    found = {name: fields[key].contents() for name, key in names.items() if key in fields}
    return Origin.from_mapping({**found, "hub_id": hub_id})


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; empty where there is none that can be read."""
    if not card.exists():
        return {}
    opening, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    if opening.strip():
        return {}
    try:
        loaded = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return loaded if isinstance(loaded, dict) else {}
