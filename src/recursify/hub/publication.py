"""What goes to the Hub, once it is certain that it may: nothing stray, no secret, and a model that loads.

A publication is a folder of links beside the model's own: the weights as they are, ``recursify.json`` without the paths
of this machine, and a model card. It is what is uploaded.
"""

from __future__ import annotations

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

from recursify.checkpoint.dense_checkpoint import INDEX_FILE, PASSENGERS
from recursify.checkpoint.record import RECORD_FILE, read_record
from recursify.errors import HubError, ParityError
from recursify.evaluation.fingerprint import TOLERANCE, Fingerprint, largest_difference
from recursify.modeling import TRAVELLING_FILES

CARD_FILE = "README.md"
PUBLISHED = (
    "config.json",
    RECORD_FILE,
    "*.safetensors",
    INDEX_FILE,
    *TRAVELLING_FILES,
    *PASSENGERS,
    "README.md",
    "layout.svg",
    "curves.png",
    "metrics.jsonl",
)
"""Files of a model's folder that are uploaded."""

LEFT_OUT = ("checkpoints", ".cache", ".git", ".gitattributes", "__pycache__", ".DS_Store")
"""What may lie in it and is not: the checkpoints of its training, and what tools leave behind."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib")

TEXTS = ("*.json", "*.jsonl", "*.md", "*.py", "*.txt", "*.jinja", "*.svg", "LICENSE*", "NOTICE*")
"""Files that are searched for secrets and paths."""

VOCABULARIES = ("tokenizer.json", "vocab.*", "merges.txt", "added_tokens.json")
"""Of those, files in which a path is a word and not a place."""

SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{32,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
LOCAL_PATHS = re.compile(
    r"(?<![\w:/.])(?:~|/(?:home|Users|root|tmp|mnt|data|work|workspace|var|opt|private|content|scratch|srv))"
    r"(?:/[\w.+@~-]+)+|\b[A-Z]:\\[\w\\. -]+"
)


@dataclass(frozen=True)
class Publication:
    """A folder ready for upload.

    Attributes:
        stage: The folder of links.
        sizes: Files in it, with their bytes; links followed.
        left_out: Names in the model's folder that are not uploaded.
        difference: How far log-probabilities in a fresh process are from the recorded ones; None where nothing is
            recorded.
    """

    stage: Path
    sizes: dict[str, int]
    left_out: list[str]
    difference: float | None


def check_folder(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of ``folder`` that are published, and the names that are left out.

    Raises:
        HubError: A pickle, a file that belongs to no model, a secret or a path of this machine.
    """
    published, left_out = [], []
    for entry in sorted(folder.iterdir()):
        if entry.name in LEFT_OUT:
            left_out.append(entry.name)
        elif any(fnmatch(entry.name, pattern) for pattern in PICKLES):
            raise HubError(
                f"'{entry}' is a pickle, which can run any code where it is loaded. The weights are in *.safetensors: "
                f"delete it, or move it out of the folder."
            )
        elif any(fnmatch(entry.name, pattern) for pattern in PUBLISHED):
            published += [entry] if entry.is_file() else [file for file in sorted(entry.rglob("*")) if file.is_file()]
        else:
            raise HubError(
                f"'{entry}' is no part of a recursive model, so it was not meant to be uploaded. Move it out of the "
                f"folder, or upload it yourself afterwards (hf upload)."
            )
    for file in published:
        _refuse_private(file)
    return published, left_out


def _refuse_private(file: Path) -> None:
    if not any(fnmatch(file.name, pattern) for pattern in TEXTS):
        return
    has_words = any(fnmatch(file.name, pattern) for pattern in VOCABULARIES)
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if found := SECRETS.search(line):
            raise HubError(
                f"'{file}' line {number} holds what looks like a secret ('{found.group()[:8]}…'). Take it out, and "
                f"revoke it: it may have been read already."
            )
        # Our own record is published without them.
        if not has_words and file.name != RECORD_FILE and (found := LOCAL_PATHS.search(line)):
            raise HubError(
                f"'{file}' line {number} holds a path of this machine ('{found.group()}'), which tells others about it "
                f"and leads nowhere for them. Take it out."
            )


def without_local_paths(value: Any) -> Any:
    """JSON-ready data in which a path of this machine is the name at its end."""
    if isinstance(value, dict):
        return {key: without_local_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_local_paths(entry) for entry in value]
    if isinstance(value, str):
        return LOCAL_PATHS.sub(lambda found: re.split(r"[/\\]", found.group())[-1], value)
    return value


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
            env={**os.environ, "HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
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
    difference = check_loading(folder, record)
    written = {
        RECORD_FILE: json.dumps(without_local_paths(record), indent=2) + "\n",
        CARD_FILE: card,
        **pictures,
    }
    for name, text in written.items():
        (stage / name).write_text(text, encoding="utf-8")
    for file in published:
        link = stage / file.relative_to(folder)
        if link.name not in written:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.absolute())
    return Publication(stage, {name: file.stat().st_size for name, file in _files(stage)}, left_out, difference)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file.relative_to(folder).as_posix(), file
