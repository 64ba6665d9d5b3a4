"""H-Fac: the formulas by hand, its memory, and runs with it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.runs import BASE, losses, make_source, weights
from recursify.errors import SettingsError
from recursify.experiments.hfac import HFac
from recursify.uptrain import checkpoints
from recursify.uptrain.run import check_settings, uptrain_model

pytestmark = pytest.mark.xdist_group("uptraining")

BETAS, EPS, CLIP, RATE, DECAY = (0.9, 0.99), 1e-30, 0.8, 0.1, 0.05


def by_hand(weight, gradients):
    """A matrix after every step, from the formulas as they are listed, outer products and all, in float64."""
    m, n = weight.shape
    ones_m, ones_n = np.ones(m), np.ones(n)
    u, r, v, s = np.zeros(m), np.zeros(m), np.zeros(n), np.zeros(n)
    for t, gradient in enumerate(gradients, start=1):
        b1, b2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in BETAS)
        u = b1 * u + (1 - b1) * gradient @ ones_n / n
        v = b1 * v + (1 - b1) * gradient.T @ ones_m / m
        r = b2 * r + (1 - b2) * (gradient**2 + EPS) @ ones_n
        s = b2 * s + (1 - b2) * (gradient.T**2 + EPS) @ ones_m
        second = np.outer(r, s) / (ones_m @ r)
        phi = b1 * (np.outer(u, ones_n) - gradient @ np.outer(ones_n, ones_n) / n) / np.sqrt(np.outer(r, ones_n) / n)
        psi = b1 * (np.outer(ones_m, v) - np.outer(ones_m, ones_m) @ gradient / m) / np.sqrt(np.outer(ones_m, s) / m)
        scaled = gradient / np.sqrt(second)
        scaled = scaled / max(1, np.sqrt(np.mean(scaled**2)) / CLIP)
        weight = weight - RATE * (0.5 * (phi + psi) + scaled + DECAY * weight)
        yield weight


def optimizer_of(*parameters, **options):
    return HFac(parameters, RATE, betas=BETAS, eps=EPS, clip_threshold=CLIP, weight_decay=DECAY, **options)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def num_state(optimizer, parameter) -> int:
    """Numbers kept for ``parameter``."""
    return sum(value.numel() for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (1, 4)])
def test_steps_by_hand(shape):
    """Five steps, with momentum, clipping and decay."""
    parameter = torch.nn.Parameter(random(*shape))
    gradients = [random(*shape, seed=step) for step in range(1, 6)]
    optimizer = optimizer_of(parameter)
    wanted = by_hand(parameter.detach().double().numpy(), [g.double().numpy() for g in gradients])
    for gradient, weight in zip(gradients, wanted, strict=True):
        parameter.grad = gradient
        optimizer.step()
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-5, atol=1e-6)


def test_the_first_step_of_a_matrix_of_rank_one():
    """No momentum yet and V = G²: every entry moves by the rate, against its sign, as far as the clip allows."""
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.tensor([[1.0, -2.0], [10.0, -20.0]])
    optimizer_of(parameter).step()
    torch.testing.assert_close(parameter.detach(), -RATE * CLIP * torch.tensor([[1.0, -1.0], [1.0, -1.0]]))


def test_a_stack_is_its_matrices():
    """Residuals of all depths in one parameter move as each by itself would, whatever their sizes."""
    start, gradients = (
        random(3, 2, 5),
        [random(3, 2, 5, seed=s) * torch.tensor([1, 1e-3, 1e3])[:, None, None] for s in (1, 2)],
    )
    stack = torch.nn.Parameter(start.clone())
    singles = [torch.nn.Parameter(start[depth].clone()) for depth in range(3)]
    together, apart = optimizer_of(stack), optimizer_of(*singles)
    for gradient in gradients:
        stack.grad = gradient
        for single, own in zip(singles, gradient, strict=True):
            single.grad = own
        together.step()
        apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([single.detach() for single in singles]))


def test_vectors_have_adam():
    """Biases of all depths, which are a matrix by shape only, too: ``factored=False``."""
    ours, theirs = torch.nn.Parameter(random(2, 7)), torch.nn.Parameter(random(2, 7))
    mine = optimizer_of(ours, factored=False)
    adam = torch.optim.AdamW([theirs], RATE, betas=BETAS, weight_decay=DECAY, eps=1e-8)
    for step in range(5):
        ours.grad = random(2, 7, seed=step + 1)
        theirs.grad = ours.grad.clone()
        mine.step()
        adam.step()
        torch.testing.assert_close(ours.detach(), theirs.detach())


def test_memory_grows_with_rows_plus_columns():
    """2 (m + n) numbers per matrix, also of a stack."""
    for shape, wanted in (((30, 50), 160), ((3, 30, 50), 480), ((50,), 100)):
        parameter = torch.nn.Parameter(random(*shape))
        parameter.grad = random(*shape, seed=1)
        optimizer = optimizer_of(parameter)
        optimizer.step()
        assert num_state(optimizer, parameter) == wanted


def test_zero_gradients_are_no_trouble():
    """A depth that is not run has none at first: nothing moves, and nothing is NaN when one comes."""
    parameter = torch.nn.Parameter(torch.ones(2, 3, 4))
    optimizer = HFac([parameter], 0.1)
    parameter.grad = torch.zeros(2, 3, 4)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(2, 3, 4))
    parameter.grad[0] = random(3, 4)
    optimizer.step()
    assert torch.isfinite(parameter).all()
    assert torch.equal(parameter.detach()[1], torch.ones(3, 4))


def test_solves_a_regression():
    """A matrix and a bias are found, at a falling rate; a loss closure is called with gradients."""
    x, weight, bias = random(200, 6), random(4, 6, seed=1), random(4, seed=2)
    y = x @ weight.T + bias
    model = torch.nn.Linear(6, 4)
    optimizer = HFac(model.parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss.detach()

    first = float(optimizer.step(closure))
    for _ in range(400):
        last = float(optimizer.step(closure))
        schedule.step()
    assert last < 1e-4 * first


def test_state_round_trip(tmp_path):
    """Saved and loaded half-way, the rest is bit for bit what it would have been."""
    gradients = [(random(4, 3, seed=step), random(5, seed=step + 100)) for step in range(6)]

    def begin():
        parameters = [torch.nn.Parameter(random(4, 3)), torch.nn.Parameter(random(5))]
        return parameters, optimizer_of(*parameters)

    def go(parameters, optimizer, steps):
        for pair in steps:
            for parameter, gradient in zip(parameters, pair, strict=True):
                parameter.grad = gradient
            optimizer.step()

    whole, optimizer = begin()
    go(whole, optimizer, gradients)
    halves, optimizer = begin()
    go(halves, optimizer, gradients[:3])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in halves]
    fresh = optimizer_of(*resumed)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    go(resumed, fresh, gradients[3:])
    for mine, theirs in zip(resumed, whole, strict=True):
        assert torch.equal(mine, theirs)


def test_values_out_of_range():
    """Each is named with its value."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(SettingsError, match=r"lr and weight_decay cannot be negative, got -1 and 0\.0"):
        HFac([parameter], -1)
    with pytest.raises(SettingsError, match=r"betas must be at least 0 and below 1, got \(0\.9, 1\.0\)"):
        HFac([parameter], betas=(0.9, 1.0))
    with pytest.raises(SettingsError, match=r"must be above 0, got 0, 1e-08 and 1\.0"):
        HFac([parameter], eps=0)
    with pytest.raises(SettingsError, match="optimizer 'hfac' factorizes whole matrices, and sharding 'zero2'"):
        check_settings(replace(BASE, optimizer="hfac", sharding="zero2"))


def test_an_uptraining_run_with_it(tmp_path):
    """The loss falls, the optimizer's file is small, and a run resumed half-way ends the same."""
    source = make_source(tmp_path, "qwen2")  # has biases
    settings = replace(BASE, optimizer="hfac", keep=4, weight_decay=0.01)
    output = tmp_path / "out"
    result = uptrain_model(source, output, settings=settings)
    assert result.after["perplexity"] < 0.8 * result.before["perplexity"]
    checkpoint = checkpoints.list_checkpoints(output / "checkpoints")[-1]
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    # Vectors and biases [R, O] make one group, matrices the other.
    assert [group["factored"] for group in state["param_groups"]].count(False) == 1
    num_moments = sum(
        v.numel() for entry in state["state"].values() for v in entry.values() if isinstance(v, torch.Tensor)
    )
    whole_losses, whole_weights = losses(output), weights(output)
    assert num_moments < 0.25 * sum(weight.numel() for weight in whole_weights.values())
    for checkpoint in checkpoints.list_checkpoints(output / "checkpoints"):
        if checkpoints.step_of(checkpoint) > 2:
            shutil.rmtree(checkpoint)
    uptrain_model(source, output, settings=settings, resume=True)
    assert losses(output) == whole_losses
    assert all(torch.equal(weight, whole_weights[name]) for name, weight in weights(output).items())
