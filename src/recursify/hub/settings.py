"""Settings of an upload: options of ``recursify push`` and keywords of ``push_model``."""

from __future__ import annotations

from pathlib import Path

from recursify.errors import SettingsError
from recursify.settings import Settings


class PushSettings(Settings):
    """Options of ``recursify push``."""

    private: bool = False
    """Make a new repository private."""
    revision: str | None = None
    """Branch to commit to, created if it does not exist. Without it, main."""
    message: str = "Upload recursive model with recursify"
    """Commit message."""
    card: Path | None = None
    """Model card to upload. Without it, README.md of the folder, else one is written."""
    base_model: str | None = None
    """Hub id of the dense model, for a written card. Without it, the recorded one."""
    license: str | None = None
    """License of this model, for a written card. Without it, the dense model's recorded one."""
    overwrite: bool = False
    """Delete files of the repository that the model does not have."""

    def __post_init__(self) -> None:
        if self.card is not None and (self.base_model or self.license):
            raise SettingsError("A card of your own names its base model and license. Omit --base-model and --license.")
