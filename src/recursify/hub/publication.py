"""Checks of a model's folder before an upload, and the staging folder that is uploaded.

The staging folder contains links to the weights, ``recursify.json`` without local paths, and a model card. The folder
is refused if it contains unknown files, pickles or secrets, or if the model does not load elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from yaml import YAMLError

from recursify.checkpoint.record import RECORD_FILE, read_record, travelling_code
from recursify.checkpoint.shards import INDEX_FILE, shard_files
from recursify.errors import HubError, ParityError
from recursify.evaluation.fingerprint import TOLERANCE, largest_difference

CARD_FILE = "README.md"
PICTURE_FILE = "layout.svg"
PUBLISHED = (
    "config.json",
    RECORD_FILE,
    INDEX_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
    CARD_FILE,
    PICTURE_FILE,
    "curves.png",
    "metrics.jsonl",
)
"""Files that are uploaded, besides the weights and the modeling code."""

TEMPLATES = "additional_chat_templates"
"""Subfolder of a tokenizer, with ``*.jinja`` files."""

LEFT_OUT = ("checkpoints", ".cache", ".git", ".gitattributes", "__pycache__", ".DS_Store")
"""Names that are skipped: training checkpoints, and files that tools create."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib")

BINARIES = ("*.safetensors", "*.png", "*.model")
"""Files that are not searched for secrets and paths."""

VOCABULARIES = ("tokenizer.json", "vocab.*", "merges.txt", "added_tokens.json")
"""Text files in which a path is a vocabulary entry."""

SECRETS = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{32,}|\b[sr]k_live_[A-Za-z0-9]{20,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bglpat-[\w-]{20,}|\bxox[abprs]-[\w-]{10,}|\bnpm_[A-Za-z0-9]{36}"
    r"|\bA[KS]IA[0-9A-Z]{16}\b|\bAIza[\w-]{35}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)

LOCAL_PATHS = re.compile(
    r"(?<![\w/.])(?:file://)?(?:~(?=/)|/(?:home|Users|root|tmp|mnt|media|data|work|workspace|var|opt|private|content|scratch"
    r"|srv|nfs|fsx|gpfs|lustre|raid|storage|projects|cluster|Volumes|kaggle)(?=/))(?:/[\w.+@~-]+)+"
    r"|\b[A-Za-z]:[\\/](?:Users|Documents and Settings)(?:[\\/][\w.+@~-]+)+"
)
"""Local paths inside a longer text, but not Hub ids and URLs."""

HOMES = re.compile(r"(?:/home|/Users|\b[A-Za-z]:[\\/]Users)[\\/][\w.+@-]+|(?<!\w)/root/")
"""Paths that contain a user name: the only ones that are refused in text for readers."""

ORIGINS = ("name_or_path", "_name_or_path", "special_tokens_map_file", "tokenizer_file")
"""Config fields in which transformers stores the path that a file was loaded from."""

WHOLE_PATH = re.compile(r"(?:file://)?(?:/|~/|\.\.?[\\/]|[A-Za-z]:[\\/]|\\\\).+", re.DOTALL)
"""A value that is a path as a whole."""


@dataclass(frozen=True)
class Publication:
    """Staging folder that is ready for upload.

    Attributes:
        stage: Path of the staging folder.
        sizes: Size in bytes of every file, links followed.
        hashes: SHA-256 of every file, computed before the checks.
        left_out: Names in the model's folder that are not uploaded.
        difference: Result of :func:`check_loading`.
    """

    stage: Path
    sizes: dict[str, int]
    hashes: dict[str, str]
    left_out: list[str]
    difference: float | None


def check_folder(folder: Path) -> tuple[list[Path], list[str]]:
    """List the files of ``folder`` to upload, and the names that are left out.

    Raises:
        HubError: There is a pickle, or a file that does not belong to a model.
        CheckpointError: Weights are missing.
    """
    expected = {*shard_files(folder).values(), *travelling_code(folder)}
    published, left_out = [], []
    for entry in sorted(folder.iterdir()):
        if entry.name in LEFT_OUT:
            left_out.append(entry.name)
            continue
        is_templates = entry.name == TEMPLATES and entry.is_dir()
        for file in sorted(entry.iterdir()) if is_templates else [entry]:
            if _matches(file, PICKLES):
                raise HubError(
                    f"'{file}' is a pickle, which can run any code when it is loaded. The weights are in "
                    f"*.safetensors: delete it, or move it out of the folder."
                )
            is_known = file.suffix == ".jinja" if is_templates else file.name in expected or _matches(file, PUBLISHED)
            if not (is_known and file.is_file()):
                raise HubError(
                    f"'{file}' is not part of a recursive model. Move it out of the folder, or upload it separately "
                    f"afterwards (hf upload)."
                )
            published.append(file)
    return published, left_out


def _matches(file: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch(file.name, pattern) for pattern in patterns)


def refuse_private(file: Path) -> None:
    """Raise :class:`~recursify.errors.HubError` if ``file`` contains a likely secret, or a path with a user name."""
    if _matches(file, BINARIES):
        return
    is_vocabulary = _matches(file, VOCABULARIES)
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if found := SECRETS.search(line):
            raise HubError(
                f"'{file.name}' line {number} contains a likely secret ('{found.group()[:8]}…'). Remove it and "
                f"revoke it: it may have been read already."
            )
        if not is_vocabulary and (found := HOMES.search(line)):
            raise HubError(
                f"'{file.name}' line {number} contains a path of this machine ('{found.group()}'). Remove it."
            )


def without_local_paths(value: Any) -> Any:
    """Replace local paths in JSON data by their last component."""
    if isinstance(value, dict):
        return {key: without_local_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if "\n" not in value and WHOLE_PATH.fullmatch(value):
        return _last_name(value)
    return LOCAL_PATHS.sub(lambda found: _last_name(found.group()), value)


def _last_name(path: str) -> str:
    """Last component of a path; a placeholder for a home folder, whose name is a user's."""
    names = [name for name in re.split(r"[/\\]", path.removeprefix("file://")) if name]
    if not names or (len(names) <= 3 and len(names) >= 2 and names[-2] in ("home", "Users")):
        return "a local folder"
    return names[-1]


def check_loading(folder: Path, record: dict[str, Any]) -> float | None:
    """Load ``folder`` in a fresh process without recursify, and compare its predictions with the fingerprint.

    Returns:
        Largest difference of log-probabilities in nats; None where ``record`` has no fingerprint.

    Raises:
        ParityError: The folder does not load, or its predictions have changed.
    """
    recorded = record.get("fingerprint")
    request = {key: recorded[key] for key in ("ids", "choices")} if recorded else {}
    script = Path(__file__).with_name("fresh_load.py")
    with tempfile.TemporaryDirectory() as cache:
        process = subprocess.run(
            [sys.executable, str(script), str(folder.absolute())],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            # The code in the folder runs here, so it gets no token.
            env={
                **{name: value for name, value in os.environ.items() if "TOKEN" not in name and "SECRET" not in name},
                "HF_HOME": cache,
                "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
        )
    if process.returncode < 0:
        raise ParityError(
            f"Loading '{folder}' in a fresh process, in float32, was ended by signal {-process.returncode}, probably "
            f"because memory ran out. Push from a machine with more memory."
        )
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise ParityError(
            f"'{folder}' does not load in a fresh process without recursify: {reason} Nothing was uploaded. "
            f"Convert or save the model again."
        )
    if not recorded:
        return None
    found = json.loads(process.stdout.splitlines()[-1])["log_probabilities"]
    difference = largest_difference(recorded, found)
    if not difference <= TOLERANCE:
        raise ParityError(
            f"'{folder}' does not reproduce its fingerprint: log-probabilities differ by {difference:.3g} nats, where "
            f"{TOLERANCE:g} is allowed. A weight, the config or the modeling code was changed since. Nothing was "
            f"uploaded; if the change is intended, remove 'fingerprint' from {RECORD_FILE}."
        )
    return difference


def read_card(file: Path) -> str:
    """Read a model card from a file.

    Raises:
        HubError: It cannot be read, or its front matter is invalid.
    """
    try:
        text = file.read_text(encoding="utf-8")
        ModelCard(text)
    except (OSError, ValueError, YAMLError) as error:
        raise HubError(f"The model card '{file}' cannot be read: {str(error).splitlines()[0]} Repair it.") from error
    return text


def stage_publication(folder: Path, stage: Path, card: str, pictures: dict[str, str]) -> Publication:
    """Check ``folder`` and fill the staging folder.

    Args:
        folder: Folder of a recursive model.
        stage: Empty folder for links, card and record.
        card: Text of the model card.
        pictures: Text of further files, by name.

    Raises:
        HubError: See :func:`check_folder`.
        ParityError: See :func:`check_loading`.
    """
    published, left_out = check_folder(folder)
    record = read_record(folder)
    clean_record = json.dumps(without_local_paths(record), indent=2) + "\n"
    written = {RECORD_FILE: clean_record, CARD_FILE: card, **pictures}
    for file in published:
        link = stage / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        if cleaned := _without_origins(file):
            written[link.name] = cleaned
        elif link.name not in written:
            link.symlink_to(file.absolute())
    for name, text in written.items():
        (stage / name).write_text(text, encoding="utf-8")
    files = {file.relative_to(stage).as_posix(): file for file in sorted(stage.rglob("*")) if file.is_file()}
    for file in files.values():
        refuse_private(file)
    sizes = {name: file.stat().st_size for name, file in files.items()}
    hashes = {name: sha256(file) for name, file in files.items()}
    return Publication(stage, sizes, hashes, left_out, check_loading(folder, record))


def _without_origins(file: Path) -> str | None:
    """Text of a config file without the paths in :data:`ORIGINS`; None if it has none."""
    if file.suffix != ".json" or not file.name.endswith("config.json"):
        return None
    fields = json.loads(file.read_text(encoding="utf-8"))
    if fields.keys().isdisjoint(ORIGINS):
        return None
    return json.dumps({key: value for key, value in fields.items() if key not in ORIGINS}, indent=2) + "\n"


def sha256(file: Path) -> str:
    """SHA-256 of the bytes of ``file``."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
