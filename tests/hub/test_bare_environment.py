"""A pushed model where nothing is installed but torch, transformers and what those need."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from test_push import REPO, recursify

LOAD = """
import importlib.util, sys
for absent in ("recursify", "accelerate", "peft", "datasets", "trl"):
    assert importlib.util.find_spec(absent) is None, absent
from transformers import AutoModelForCausalLM, AutoTokenizer

name = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
written = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=5, do_sample=False)
print(type(model).__name__, written.shape[1])
"""


def needed_by(*names: str) -> Iterator[Distribution]:
    """The distributions that ``names`` bring along, themselves included, without extras."""
    seen: set[str] = set()
    wanted = list(names)
    while wanted:
        name = wanted.pop()
        if name.lower() in seen:
            continue
        seen.add(name.lower())
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # needed on other systems only
        yield found
        requirements = map(Requirement, found.requires or [])
        wanted += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def make_bare_environment(folder: Path) -> Path:
    """A virtual environment with links to those distributions, as if they had been installed; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for found in needed_by("torch", "transformers"):
        for name in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / name).exists():
                (packages / name).symlink_to(Path(str(found.locate_file(name))))
    return folder / "bin" / "python"


def test_a_pushed_model_loads_and_generates(hub, folder, tmp_path):
    """From the Hub, by its name, into an empty cache."""
    recursify(hub, tmp_path / "pusher", "push", str(folder), REPO)
    python = make_bare_environment(tmp_path / "bare")
    environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        [str(python), "-c", LOAD, REPO], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["RecursiveForCausalLM", str(len("Once") + 5)]
