"""What tests of uptraining runs have in common: small settings, and what two runs are compared by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recursify.uptrain.callbacks import read_metrics
from recursify.uptrain.run import uptrain_model
from recursify.uptrain.settings import UptrainSettings

BASE = UptrainSettings(
    length=32, batch_size=4, max_tokens=6 * 4 * 32, learning_rate=5e-3, eval_every=3, save_every=2, warmup_fraction=0.2
)


def losses(output) -> dict[int, float]:
    """The loss of every step."""
    return {line["step"]: line["loss"] for line in read_metrics(output / "metrics.jsonl") if "loss" in line}


def weights(output) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def assert_same(first, second, tolerance=2e-5):
    """The same losses and weights. Adam divides by gradients' sizes, so rounding shows in 1e-5 of the weights."""
    assert losses(first).keys() == losses(second).keys()
    for step, loss in losses(first).items():
        assert losses(second)[step] == pytest.approx(loss, rel=1e-5), step
    mine, theirs = weights(first), weights(second)
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], atol=tolerance, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def assert_resumes(source: Path, folder: Path, settings: UptrainSettings) -> None:
    """A run of six steps, cut after the fourth, goes on to the same losses and weights as one that was not."""
    uptrain_model(source, folder / "whole", settings=settings)

    class Cut(Exception):
        pass

    def cut(stage, done, total):
        if done == 4 * 4 * 32:
            raise Cut

    with pytest.raises(Cut):
        uptrain_model(source, folder / "cut", settings=settings, progress=cut)
    uptrain_model(source, folder / "cut", settings=settings, resume=True)
    assert losses(folder / "cut") == losses(folder / "whole")
    mine, theirs = weights(folder / "cut"), weights(folder / "whole")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
