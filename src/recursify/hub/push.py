"""``push_model``: check a recursive model, write its card and upload both to the Hub."""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from recursify.checkpoint.description import ModelDescription, inspect_model
from recursify.checkpoint.loading import require_recursive
from recursify.checkpoint.record import read_record, write_model_files
from recursify.checkpoint.shards import INDEX_FILE
from recursify.checkpoint.sources import locate
from recursify.errors import CheckpointError, HubError
from recursify.evaluation.fingerprint import take_fingerprint
from recursify.modeling import RecursiveForCausalLM
from recursify.progress import Progress, silent
from recursify.settings import resolve_settings

from .card import Card, write_card
from .publication import CARD_FILE, PICTURE_FILE, check_folder, read_card, stage_publication, without_local_paths
from .settings import PushSettings
from .upload import check_repo_id, upload

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushResult:
    """Content of an upload, and its address unless it was a dry run.

    Attributes:
        repo_id: Repository, ``owner/name``.
        files: Size in bytes of every uploaded file.
        left_out: Names in the model's folder that are not uploaded.
        difference: Largest difference of log-probabilities, in nats, between a fresh process and the recorded
            fingerprint; None without a fingerprint.
        warnings: Warnings about the license and the fingerprint.
        card: Text of the model card.
        url: Page of the repository; None for a dry run.
        commit: Id of the commit; None for a dry run.
    """

    repo_id: str
    files: dict[str, int]
    left_out: list[str]
    difference: float | None
    warnings: list[str]
    card: str
    url: str | None = None
    commit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the card for a dry run, the address otherwise."""
        omitted = ("url", "commit") if self.commit is None else ("card",)
        return {name: value for name, value in asdict(self).items() if name not in omitted}


def push_model(
    model: str | Path,
    repo_id: str,
    *,
    settings: PushSettings | None = None,
    dry_run: bool = False,
    token: str | None = None,
    progress: Progress = silent,
    **options: Any,
) -> PushResult:
    """Upload a recursive model with a model card of everything that was recorded and measured.

    The folder is checked first: it must load in a fresh process without recursify, reproduce the recorded fingerprint,
    and contain no pickle, no secret and no local path. An interrupted upload is resumed by calling again.

    Args:
        model: Folder of a recursive model.
        repo_id: Repository ``owner/name``, or ``name`` in the account of the token.
        settings: Settings; give these or ``options``.
        dry_run: Stop after the checks.
        token: Token of the account; None takes the one of ``hf auth login`` or ``HF_TOKEN``.
        progress: Callback for the two stages, ``check`` and ``upload``.
        options: Fields of :class:`~recursify.hub.settings.PushSettings`.

    Raises:
        CheckpointError: ``model`` is not the folder of a recursive model.
        HubError: The repository name is invalid, the folder contains a file that must not be uploaded, or the Hub
            refuses.
        ParityError: The folder does not load in a fresh process, or differs from its fingerprint.
        SettingsError: The settings are invalid.
    """
    settings = resolve_settings(PushSettings, settings, options)
    folder = require_recursive(model)
    check_repo_id(repo_id)
    card, pictures = _prepare_card(folder, repo_id, settings)
    warnings = list(card.warnings)
    for warning in warnings:
        logger.warning(warning)
    with tempfile.TemporaryDirectory() as scratch:
        progress("check", 0, 1)
        publication = stage_publication(folder, Path(scratch), card.text, pictures)
        progress("check", 1, 1)
        if publication.difference is None:
            warnings.append("recursify.json has no fingerprint, so the predictions of the model were not compared.")
            logger.warning(warnings[-1])
        facts = publication.sizes, publication.left_out, publication.difference
        result = PushResult(repo_id, *facts, warnings, card.text)
        if dry_run:
            return result
        progress("upload", 0, 1)
        commit = upload(publication, repo_id, settings, token=token)
        progress("upload", 1, 1)
    return replace(result, repo_id=commit.repo_url.repo_id, url=str(commit.repo_url), commit=commit.oid)


def _prepare_card(folder: Path, repo_id: str, settings: PushSettings) -> tuple[Card, dict[str, str]]:
    """The card to upload, and the picture that a written one shows, by file name."""
    record = without_local_paths(read_record(folder))
    description = inspect_model(folder)
    description = replace(description, made_from=without_local_paths(description.made_from))
    pictures = _draw_picture(description)
    base_model, license, picture = settings.base_model, settings.license, next(iter(pictures), None)
    card = write_card(description, record, repo_id, base_model=base_model, license=license, picture=picture)
    own_card = settings.card or folder / CARD_FILE
    if settings.card or own_card.exists():
        card = replace(card, text=read_card(own_card))
        if base_model or license:
            unused = f"{own_card} is uploaded unchanged; --base-model and --license apply to a written card."
            card.warnings.append(unused)
    return card, pictures


def _draw_picture(description: ModelDescription) -> dict[str, str]:
    """SVG of the layout by file name; none without matplotlib, since the card also shows the layout as text."""
    if find_spec("matplotlib") is None:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / PICTURE_FILE
        description.plot(file)
        return {PICTURE_FILE: file.read_text(encoding="utf-8")}


def push_loaded_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
    **unsupported: Any,
) -> str:
    """``RecursiveForCausalLM.push_to_hub``: save to a temporary folder, and push that with all checks.

    The record, tokenizer and card of the folder or repository that the model was loaded from are uploaded, too. A model
    that was changed since is refused, because the recorded figures are not its own.

    Args:
        model: Loaded recursive model.
        repo_id: Repository ``owner/name``, or ``name`` in the account of the token.
        commit_message: Commit message.
        private: Make a new repository private.
        token: Token of the account; None or True takes the one of ``hf auth login`` or ``HF_TOKEN``.
        revision: Branch to commit to.
        max_shard_size: Maximum size of a weight file.
        **unsupported: Further arguments of ``PreTrainedModel.push_to_hub``, which must keep their defaults.

    Returns:
        Page of the commit.

    Raises:
        HubError: An argument is not supported, or see :func:`push_model`.
        ParityError: See :func:`push_model`.
    """
    if refused := sorted(name for name, value in unsupported.items() if value):
        raise HubError(f"push_to_hub() of a recursive model does not support {', '.join(refused)}. Omit it.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        _save_for_push(model, folder, max_shard_size)
        settings = PushSettings(private=bool(private), revision=revision)
        if commit_message:
            settings = replace(settings, message=commit_message)
        result = push_model(folder, repo_id, settings=settings, token=token if isinstance(token, str) else None)
    return f"{result.url}/commit/{result.commit}"


def _save_for_push(model: PreTrainedModel, folder: Path, max_shard_size: int | str) -> None:
    """Save ``model`` into ``folder`` with the files and the record of the checkpoint that it was loaded from."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    record: dict[str, Any] = {}
    if origin := _origin(model):
        for file in check_folder(origin)[0]:
            target = folder / file.relative_to(origin)
            if file.suffix not in (".safetensors", ".py") and file.name != INDEX_FILE and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
        record = read_record(origin)
    if not record.get("fingerprint"):
        saved = RecursiveForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        record["fingerprint"] = take_fingerprint(saved)
    write_model_files(folder, copy.deepcopy(model.config), record)


def _origin(model: PreTrainedModel) -> Path | None:
    """The folder that ``model`` was loaded from, or the local copy of its repository."""
    name = model.config.name_or_path
    try:
        return require_recursive(locate(name)) if name else None
    except CheckpointError:
        return None
