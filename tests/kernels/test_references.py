"""References of the kernels, and the selection of an implementation; none of it needs Triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from recursify.experiments.kernels.grouped_lora import add_depth_lora, reference
from recursify.experiments.kernels.route import GATES, scatter_gated
from recursify.kernels.dispatch import implementation_on, why_not_triton
from recursify.kernels.exit_head import exit_statistics
from recursify.kernels.slot_advance import OutputRing, Slots, advance_slots
from recursify.modeling import ROUTER_GATES
from recursify.modeling.recursive_policies import Confidence, Entropy
from recursify.modeling.recursive_routing import gated

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("form", [reference.by_masked_concatenation, reference.by_grouped_products])
def test_forms_of_residuals_agree(form, rows):
    """All forms give the same sums for mixed depths, depths without rows, and negative depths."""
    y, x, a, b = (torch.randn(shape) for shape in ((rows, 24), (rows, 16), (3, 8, 16), (3, 24, 8)))
    for depth in (torch.randint(-1, 3, (rows,)), torch.full((rows,), 2), torch.full((rows,), -1)):
        expected = y.clone()
        for row, level in enumerate(depth.tolist()):
            if level >= 0:
                expected[row] += b[level] @ a[level] @ x[row]
        for found in (form(y.clone(), x, a, b, depth), reference.by_slices(y.clone(), x, a, b, depth)):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(add_depth_lora(y.clone(), x, a, b, depth), expected, atol=1e-5, rtol=1e-5)


def test_exit_head_computes_what_policies_do():
    """Margin and entropy are the confidences of the policies ``confidence`` and ``entropy`` for the same logits."""
    states, weight = torch.randn(9, 32), torch.randn(300, 32) / 4
    boundary = type("Boundary", (), {"logits": states @ weight.T})()
    found = exit_statistics(states, weight)
    torch.testing.assert_close(found.probability_margin, Confidence(0.5).confidence(boundary), atol=1e-5, rtol=1e-4)
    normalized = 1 - found.entropy / torch.tensor(300.0).log()
    torch.testing.assert_close(normalized, Entropy(0.5).confidence(boundary), atol=1e-5, rtol=1e-4)
    assert torch.equal(found.choice, boundary.logits.argmax(-1))


@pytest.mark.parametrize("kind", GATES)
def test_gates_are_those_of_routers(kind):
    """Selected rows are gated as by routers; others do not change, and negative row numbers are skipped."""
    states, made, gate = torch.randn(6, 8), torch.randn(3, 8), torch.randn(3)
    expected = states.clone()
    expected[4], expected[1] = gated(states[4], made[0], gate[0], kind), gated(states[1], made[2], gate[2], kind)
    found = scatter_gated(states, made, gate, torch.tensor([4, -1, 1]), kind=kind)
    torch.testing.assert_close(found, expected)
    assert kind in ROUTER_GATES


def test_slots_advance_one_recursion_or_one_token():
    """A slot worked out by hand: a token of two recursions, the last token of one, then no change."""
    slots, ring = Slots.empty(2), OutputRing.empty(2)
    slots.active[1], slots.position[1], slots.address[1] = True, 3, 43
    seen = []
    for leaves, choice in ((False, 5), (True, 6), (True, 7), (True, 8)):
        advance_slots(
            slots,
            torch.tensor([True, leaves]),
            torch.tensor([1, choice]),
            limits=torch.tensor([99, 5]),
            ends=torch.tensor([], dtype=torch.int64),
            block_table=torch.tensor([[0, 0], [10, 20]]),
            page_size=4,
            num_depths=3,
            ring=ring,
        )
        names = ("active", "token", "depth", "position", "address", "finished")
        seen.append([int(getattr(slots, name)[1]) for name in names])
    assert seen == [
        [1, 0, 1, 3, 43, 0],
        [1, 6, 0, 4, 80, 0],
        [0, 7, 0, 5, -1, 1],
        [0, 7, 0, 5, -1, 1],
    ]
    assert ring.entries.tolist() == [[1, 6, 1, 1], [1, 7, 0, 2]]
    assert ring.counts.tolist() == [2, 4]
    assert not slots.active[0]
    assert not slots.finished[0]


def test_a_cpu_takes_the_reference():
    """The default on a CPU is the reference, and requesting Triton there raises."""
    assert implementation_on(CPU) == "reference"
    with pytest.raises(RuntimeError, match="'triton' cannot run on 'cpu'"):
        exit_statistics(torch.zeros(1, 2), torch.zeros(3, 2), implementation="triton")
    with pytest.raises(ValueError, match=r"Unknown implementation 'cuda'\. Use one of: auto, reference, triton"):
        implementation_on(CPU, "cuda")


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), "reference"), ((8, 0), "triton"), ((9, 0), "triton")])
def test_a_gpu_takes_triton_where_it_compiles(monkeypatch, capability, taken):
    """Requesting Triton on an older GPU raises an error that names its capability."""
    pytest.importorskip("triton", reason="has wheels for Linux")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    why_not_triton.cache_clear()
    gpu = torch.device("cuda", 0)
    assert implementation_on(gpu) == taken
    if taken == "reference":
        with pytest.raises(RuntimeError, match=r"its compute capability is 7\.5, and kernels need 8\.0"):
            implementation_on(gpu, "triton")
    why_not_triton.cache_clear()


def test_kernels_work_without_triton():
    """All kernels can be imported without Triton, and ``auto`` is then the reference."""
    program = """
import importlib, pkgutil, sys
sys.modules["triton"] = None
import torch
for parent in ("recursify.kernels", "recursify.experiments.kernels"):
    for module in pkgutil.iter_modules(importlib.import_module(parent).__path__):
        if module.ispkg:
            importlib.import_module(f"{parent}.{module.name}")
from recursify.kernels.exit_head import exit_statistics
print(exit_statistics(torch.eye(2), torch.eye(2)).choice.tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[0, 1]\n", done.stderr
