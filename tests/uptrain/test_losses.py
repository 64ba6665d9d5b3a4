"""Losses: values worked out by hand, and chunks that change nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recursify.uptrain.losses import chunked_loss, cross_entropy, forward_kl


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
