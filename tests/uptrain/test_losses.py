"""Losses: values worked out by hand, and chunks that change nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recursify.uptrain.losses import (
    chunked_loss,
    cross_entropy,
    dynamic_pairs,
    forward_kl,
    layer_distillation,
    uniform_teachers,
    weighted_coefficients,
)


def test_cross_entropy_by_hand():
    """Two tokens over two words: ``-log 3/4`` and ``-log 1/2``."""
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    assert float(cross_entropy(logits, torch.tensor([0, 1]))) == pytest.approx(math.log(4 / 3) + math.log(2))


def test_forward_kl_by_hand():
    """``KL((1/2, 1/2) ‖ (3/4, 1/4)) = ½ log(4/3)``, and it is not symmetric."""
    model, teacher = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert float(forward_kl(model, teacher)) == pytest.approx(0.5 * math.log(4 / 3))
    assert float(forward_kl(teacher, model)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_forward_kl_at_a_temperature():
    """At ``T = 2`` both distributions are those of half the logits, times ``T² = 4``."""
    model, teacher = torch.tensor([[2 * math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert float(forward_kl(model, teacher, 2.0)) == pytest.approx(4 * 0.5 * math.log(4 / 3))


def test_teacher_gets_no_gradient():
    """Even where the teacher's logits could have one."""
    model, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    forward_kl(model, teacher).backward()
    assert model.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_neither_loss_nor_gradients(chunk):
    """Against the whole matrix of logits, at chunks that divide 7 tokens and that do not."""
    torch.manual_seed(0)
    hidden, head = torch.randn(7, 6, requires_grad=True), nn.Linear(6, 11)
    targets = torch.randint(0, 11, (7,))
    expected = 3 * F.cross_entropy(head(hidden), targets, reduction="sum")
    wanted = torch.autograd.grad(expected, [hidden, head.weight, head.bias])

    def loss(pieces, rows):
        ce = cross_entropy(head(pieces[0]), targets[rows])
        return ce, {"ce": ce, "tokens": torch.tensor(float(len(pieces[0])))}

    total, sums = chunked_loss([hidden], list(head.parameters()), loss, chunk)
    found = torch.autograd.grad(3 * total, [hidden, head.weight, head.bias])
    assert float(3 * total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert float(sums["ce"]) == pytest.approx(float(total.detach()), rel=1e-6)
    assert float(sums["tokens"]) == 7
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_frozen_head_gets_no_gradient():
    """And the hidden states still get theirs."""
    hidden, head = torch.randn(4, 6, requires_grad=True), nn.Linear(6, 11, bias=False).requires_grad_(False)
    total, _ = chunked_loss([hidden], list(head.parameters()), lambda p, rows: (head(p[0]).square().sum(), {}), chunk=3)
    total.backward()
    torch.testing.assert_close(hidden.grad, 2 * head(hidden.detach()) @ head.weight)
    assert head.weight.grad is None


def test_without_gradients_none_are_taken():
    """Under ``no_grad`` the chunks are read out and nothing is differentiated."""
    hidden, head = torch.randn(4, 6), nn.Linear(6, 11, bias=False)
    seen = []

    def loss(pieces, rows):
        seen.append(torch.is_grad_enabled())
        return head(pieces[0]).sum(), {}

    with torch.no_grad():
        total, _ = chunked_loss([hidden], list(head.parameters()), loss, chunk=3)
    assert seen == [False, False]
    torch.testing.assert_close(total, head(hidden).sum().detach())


def test_two_inputs_of_which_one_is_detached():
    """As an exit's states and its boundary's are: only the first gets a gradient."""
    states, boundary = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    head = nn.Linear(3, 2)

    def loss(pieces, rows):
        return (head(pieces[0]) * head(pieces[1])).sum(), {}

    total, _ = chunked_loss([states, boundary], list(head.parameters()), loss, chunk=2)
    found = torch.autograd.grad(total, [states, head.weight])
    wanted = torch.autograd.grad((head(states) * head(boundary)).sum(), [states, head.weight])
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_weighted_coefficients():
    """``i / Σj``: 1/6, 2/6, 3/6."""
    assert weighted_coefficients(3) == pytest.approx([1 / 6, 2 / 6, 3 / 6])


@pytest.mark.parametrize(
    ("shallow", "layers", "expected"),
    [
        (12, 24, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]),
        (8, 24, [2, 5, 8, 11, 14, 17, 20, 23]),
        (6, 24, [3, 7, 11, 15, 19, 23]),
        (4, 24, [5, 11, 17, 23]),
        (3, 12, [3, 7, 11]),
        (15, 30, list(range(1, 30, 2))),
    ],
)
def test_uniform_teachers_of_free(shallow, layers, expected):
    """The tables in FREE's code, and ours for SmolLM2 at half depth."""
    assert uniform_teachers(shallow, layers) == expected


def test_dynamic_pairs_are_monotone():
    """The last teacher takes the nearest student; each before it one before that, by least distance."""
    distances = torch.tensor([[0.1, 9.0, 9.0], [0.0, 0.5, 9.0], [9.0, 0.1, 0.2], [9.0, 9.0, 0.3]])
    assert dynamic_pairs(distances, [3, 7, 11]) == [(2, 11), (1, 7), (0, 3)]


def test_dynamic_pairs_reuse_the_first_student():
    """Where the nearest student is the first at once, all earlier teachers teach it too."""
    distances = torch.tensor([[5.0, 5.0, 0.1], [0.0, 0.0, 0.2]])
    assert dynamic_pairs(distances, [3, 7, 11]) == [(0, 11), (0, 7), (0, 3)]


def test_layer_distillation_by_hand():
    """One token of width two; students 0 and 1, layers 0 .. 3 at 0, 1, 3 and 7."""
    states = [torch.full((1, 2), value, requires_grad=True) for value in (0.0, 1.0, 3.0, 7.0)]
    assert float(layer_distillation(states, 2, "kd_last")) == 36.0  # 1 ← 7
    assert float(layer_distillation(states, 2, "kd_unif")) == pytest.approx((1 + 36) / 2)  # 0 ← 1, 1 ← 7
    assert float(layer_distillation(states, 2, "kd_dyna")) == pytest.approx((36 + 1) / 2)  # 1 ← 7, then 0 ← 1
    layer_distillation(states, 2, "kd_last").backward()
    assert states[1].grad.tolist() == [[-6.0, -6.0]]  # 2 (1 − 7) / 2 per entry
    assert states[3].grad is None
