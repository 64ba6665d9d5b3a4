"""What goes to the Hub, once it is certain that it may: nothing stray, no secret, and a model that loads.

A publication is a folder of links beside the model's own: the weights as they are, ``recursify.json`` without the paths
of this machine, and a model card. It is what is uploaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from yaml import YAMLError

from recursify.checkpoint.record import RECORD_FILE, read_record, travelling_code
from recursify.checkpoint.shards import INDEX_FILE, shard_files
from recursify.errors import HubError, ParityError
from recursify.evaluation.fingerprint import TOLERANCE, Fingerprint, largest_difference

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
"""Files of a model's folder that are uploaded, beside its weights and its code."""

TEMPLATES = "additional_chat_templates"
"""The one folder that belongs to a tokenizer; it holds ``*.jinja``."""

LEFT_OUT = ("checkpoints", ".cache", ".git", ".gitattributes", "__pycache__", ".DS_Store")
"""What may lie in it and is not: the checkpoints of its training, and what tools leave behind."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib")

BINARIES = ("*.safetensors", "*.png", "*.model")
"""Files that are not searched for secrets and paths."""

VOCABULARIES = ("tokenizer.json", "vocab.*", "merges.txt", "added_tokens.json")
"""Of the others, files in which a path is a word and not a place."""

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
"""Paths of a machine inside a longer text; what a Hub id or a URL is, it is not."""

HOMES = re.compile(r"(?:/home|/Users|\b[A-Za-z]:[\\/]Users)[\\/][\w.+@-]+|(?<!\w)/root/")
"""Paths that name a person, or their place on a machine: in a text for readers, only these are refused."""

ORIGINS = ("name_or_path", "_name_or_path", "special_tokens_map_file", "tokenizer_file")
"""Fields in which transformers keeps where something was loaded from."""

WHOLE_PATH = re.compile(r"(?:file://)?(?:/|~/|\.\.?[\\/]|[A-Za-z]:[\\/]|\\\\).+", re.DOTALL)
"""A value that is a path, whatever is in it."""


@dataclass(frozen=True)
class Publication:
    """A folder ready for upload.

    Attributes:
        stage: The folder of links.
        sizes: Files in it, with their bytes; links followed.
        hashes: SHA-256 of every file, as they were before the checks.
        left_out: Names in the model's folder that are not uploaded.
        difference: How far log-probabilities in a fresh process are from the recorded ones; None where nothing is
            recorded.
    """

    stage: Path
    sizes: dict[str, int]
    hashes: dict[str, str]
    left_out: list[str]
    difference: float | None


def check_folder(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of ``folder`` that are published, and the names that are left out.

    Raises:
        HubError: A pickle, or a file that belongs to no model.
        CheckpointError: Weights are missing.
    """
    expected = {*shard_files(folder).values(), *travelling_code(folder)}
    published, left_out = [], []
    for entry in sorted(folder.iterdir()):
        if entry.name in LEFT_OUT:
            left_out.append(entry.name)
        elif any(fnmatch(entry.name, pattern) for pattern in PICKLES):
            raise HubError(
                f"'{entry}' is a pickle, which can run any code where it is loaded. The weights are in *.safetensors: "
                f"delete it, or move it out of the folder."
            )
        elif entry.name == TEMPLATES and entry.is_dir():
            published += [_require_template(file) for file in sorted(entry.iterdir())]
        elif entry.is_file() and (entry.name in expected or any(fnmatch(entry.name, pattern) for pattern in PUBLISHED)):
            published.append(entry)
        else:
            raise _stray(entry)
    return published, left_out


def _require_template(file: Path) -> Path:
    if file.suffix != ".jinja" or not file.is_file():
        raise _stray(file)
    return file


def _stray(entry: Path) -> HubError:
    return HubError(
        f"'{entry}' is no part of a recursive model, so it was not meant to be uploaded. Move it out of the folder, or "
        f"upload it yourself afterwards (hf upload)."
    )


def refuse_private(file: Path) -> None:
    """Raises:
    HubError: ``file`` holds what looks like a secret, or a path that names a person.
    """
    if any(fnmatch(file.name, pattern) for pattern in BINARIES):
        return
    has_words = any(fnmatch(file.name, pattern) for pattern in VOCABULARIES)
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if found := SECRETS.search(line):
            raise HubError(
                f"'{file.name}' line {number} holds what looks like a secret ('{found.group()[:8]}…'). Take it out, "
                f"and revoke it: it may have been read already."
            )
        if not has_words and (found := HOMES.search(line)):
            raise HubError(
                f"'{file.name}' line {number} holds a path of this machine ('{found.group()}'), which tells others "
                f"about it and leads nowhere for them. Take it out."
            )


def without_local_paths(value: Any) -> Any:
    """JSON-ready data in which a path of this machine is the name at its end."""
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
    """The name at the end of a path; of a home, which is a person's, nothing."""
    names = [name for name in re.split(r"[/\\]", path.removeprefix("file://")) if name]
    if not names or (len(names) <= 3 and len(names) >= 2 and names[-2] in ("home", "Users")):
        return "a local folder"
    return names[-1]


def check_loading(folder: Path, record: dict[str, Any]) -> float | None:
    """Load ``folder`` in a fresh process that has no recursify, and compare what it says with the record.

    Returns:
        The largest difference of log-probabilities, or None where the record has no fingerprint.

    Raises:
        ParityError: It does not load, or says something else than it did when it was made.
    """
    recorded = record.get("fingerprint")
    asked = {key: recorded[key] for key in ("ids", "choices")} if recorded else {}
    script = Path(__file__).with_name("fresh_load.py")
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, str(script), str(folder.absolute())],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            # What the folder brings along is run here: it gets no token.
            env={
                **{name: value for name, value in os.environ.items() if "TOKEN" not in name and "SECRET" not in name},
                "HF_HOME": cache,
                "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
        )
    if done.returncode < 0:
        raise ParityError(
            f"Loading '{folder}' in a fresh process, in float32, was ended by signal {-done.returncode}, most likely "
            f"for want of memory. Push from a machine that holds the model."
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ParityError(
            f"'{folder}' does not load in a fresh process without recursify, as others will load it: {reason} Nothing "
            f"was uploaded. Convert or save the model again."
        )
    if not recorded:
        return None
    found = json.loads(done.stdout.splitlines()[-1])["log_probabilities"]
    difference = largest_difference(Fingerprint(**recorded), found)
    if not difference <= TOLERANCE:
        raise ParityError(
            f"'{folder}' does not say what it said when it was made: log-probabilities differ by {difference:.3g} "
            f"nats, where {TOLERANCE:g} is allowed. A weight, the config or the modeling code was changed since. "
            f"Nothing was uploaded; if the change was meant, drop 'fingerprint' from {RECORD_FILE}."
        )
    return difference


def read_card(file: Path) -> str:
    """A model card that its author wrote.

    Raises:
        HubError: It cannot be read, or has no front matter that the Hub understands.
    """
    try:
        text = file.read_text(encoding="utf-8")
        ModelCard(text)
    except (OSError, ValueError, YAMLError) as error:
        raise HubError(f"The model card '{file}' cannot be read: {str(error).splitlines()[0]}") from error
    return text


def stage_publication(folder: Path, stage: Path, card: str, pictures: dict[str, str]) -> Publication:
    """Check ``folder`` and lay out what is uploaded in ``stage``, an empty folder.

    Args:
        folder: A recursive model.
        stage: Where links, card and record go.
        card: Text of the model card.
        pictures: Further text files, by name.

    Raises:
        HubError: See :func:`check_folder`.
        ParityError: See :func:`check_loading`.
    """
    published, left_out = check_folder(folder)
    record = read_record(folder)
    written = {
        RECORD_FILE: json.dumps(without_local_paths(record), indent=2) + "\n",
        CARD_FILE: card,
        **pictures,
    }
    for file in published:
        link = stage / file.relative_to(folder)
        if link.name in written:
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        if (cleaned := _without_origins(file)) is not None:
            link.write_text(cleaned, encoding="utf-8")
        else:
            link.symlink_to(file.absolute())
    for name, text in written.items():
        (stage / name).write_text(text, encoding="utf-8")
    files = dict(_files(stage))
    for file in files.values():
        refuse_private(file)
    sizes = {name: file.stat().st_size for name, file in files.items()}
    hashes = {name: sha256(file) for name, file in files.items()}
    return Publication(stage, sizes, hashes, left_out, check_loading(folder, record))


def _without_origins(file: Path) -> str | None:
    """A config of the tokenizer or the model without where it was loaded from; None where it does not say."""
    if file.suffix != ".json" or not file.name.endswith("config.json"):
        return None
    fields = json.loads(file.read_text(encoding="utf-8"))
    named = {key for key in ORIGINS if key in fields}
    if not named:
        return None
    return json.dumps({key: value for key, value in fields.items() if key not in named}, indent=2) + "\n"


def sha256(file: Path) -> str:
    """Of the bytes of ``file``."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file.relative_to(folder).as_posix(), file
