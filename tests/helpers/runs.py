"""Small uptraining runs: models, settings, and comparisons of two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny_models import convert_tiny, random_ids, save_tiny
from recursify.uptrain.callbacks import read_metrics
from recursify.uptrain.data import IGNORED
from recursify.uptrain.run import uptrain_model
from recursify.uptrain.settings import UptrainSettings

BASE = UptrainSettings(
    length=32, batch_size=4, max_tokens=6 * 4 * 32, learning_rate=5e-3, eval_every=3, save_every=2, warmup_fraction=0.2
)


def make_source(folder: Path, family: str = "llama", *, dense: dict[str, Any] | None = None, **conversion: Any) -> Path:
    """Write a recursive model with rank 4 into ``folder/recursive`` and its dense teacher into ``folder/dense``."""
    save_tiny(folder / "dense", family, **(dense or {}))
    convert_tiny(folder / "dense", folder / "recursive", **{"lora_rank": 4, **conversion})
    return folder / "recursive"


def packed_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two packed rows of eleven tokens, four of them without labels."""
    ids = random_ids(2, 11, seed)
    labels = ids.clone()
    labels[0, :4] = IGNORED
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(11).expand(2, -1)}


def losses(output) -> dict[int, float]:
    """Loss by step."""
    return {line["step"]: line["loss"] for line in read_metrics(output / "metrics.jsonl") if "loss" in line}


def weights(output) -> dict[str, torch.Tensor]:
    """Tensors of a finished model by name."""
    return load_file(output / "model.safetensors")


def assert_same(first, second, tolerance=2e-5):
    """Compare losses and weights. Adam divides by the size of gradients, so weights differ by 1e-5 from rounding."""
    assert losses(first).keys() == losses(second).keys()
    for step, loss in losses(first).items():
        assert losses(second)[step] == pytest.approx(loss, rel=1e-5), step
    expected = weights(second)
    assert weights(first).keys() == expected.keys()
    for name, weight in weights(first).items():
        torch.testing.assert_close(weight, expected[name], atol=tolerance, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def assert_identical(first, second):
    """Compare losses and weights bit for bit."""
    got, wanted = losses(first), losses(second)
    steps = got.keys() | wanted.keys()
    other = {step: (got.get(step), wanted.get(step)) for step in steps if got.get(step) != wanted.get(step)}
    assert not other, f"other losses, by step: {other}"
    expected = weights(second)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(first).items())


def assert_resumes(source: Path, folder: Path, settings: UptrainSettings) -> None:
    """Interrupt a run of six steps after the fourth, resume it, and compare it with an uninterrupted run."""
    uptrain_model(source, folder / "whole", settings=settings)

    class Cut(Exception):
        pass

    def cut(stage, done, total):
        if done == 4 * 4 * 32:
            raise Cut

    with pytest.raises(Cut):
        uptrain_model(source, folder / "cut", settings=settings, progress=cut)
    uptrain_model(source, folder / "cut", settings=settings, resume=True)
    assert_identical(folder / "cut", folder / "whole")
