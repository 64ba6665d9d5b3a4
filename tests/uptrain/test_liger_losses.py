"""Liger's kernels against the torch forms: interpreted on the CPU, in a process of their own.

Triton decides whether to interpret when kernels are imported, so what they compute is computed once, in a fresh
process, and the tests here read it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import profile
from transformers import AutoModelForCausalLM

from helpers import python_path
from helpers.runs import BASE, make_source
from helpers.tiny_models import random_ids
from recursify.errors import SettingsError
from recursify.modeling import RecursiveForCausalLM
from recursify.uptrain import liger_losses
from recursify.uptrain.data import IGNORED
from recursify.uptrain.exits import Exits
from recursify.uptrain.heal import Heal
from recursify.uptrain.losses import cross_entropy, forward_kl
from recursify.uptrain.run import uptrain_model

pytestmark = pytest.mark.xdist_group("uptraining")
interpreted = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is for Linux, where Triton is"
)

# Tokens and vocabulary: 1000 is no multiple of a tile, 40 000 is more than one.
CASES = [(1, 1000, torch.float32), (63, 1000, torch.float32), (2, 40_000, torch.float32), (5, 1000, torch.bfloat16)]
TERMS = {
    "ce": lambda logits, teacher, targets, backend: cross_entropy(logits, targets, backend),
    "kl": lambda logits, teacher, targets, backend: forward_kl(logits, teacher, 1.0, backend),
    "kl at 2": lambda logits, teacher, targets, backend: forward_kl(logits, teacher, 2.0, backend),
    # In both orders, since each must leave the logits to the next.
    "ce, kl": lambda logits, teacher, targets, backend: (
        0.7 * cross_entropy(logits, targets, backend) + 0.3 * forward_kl(logits, teacher, 1.0, backend)
    ),
    "kl, ce": lambda logits, teacher, targets, backend: (
        0.3 * forward_kl(logits, teacher, 1.0, backend) + 0.7 * cross_entropy(logits, targets, backend)
    ),
}
BACKENDS = ("torch", "liger")


def compute(folder: Path) -> None:
    """What the tests compare, into ``folder``; the recursive model and its teacher lie there already."""
    results = {}
    for backend in BACKENDS:
        for case in CASES:
            for term in TERMS:
                results["term", term, case, backend] = _term(term, *case, backend)
        results["measured", backend] = _measured(backend)
        for stage in ("heal", "exits"):
            for trains in (True, False):
                results["objective", stage, trains, backend] = _objective(folder, stage, trains, backend)
        for term in ("ce", "kl"):
            results["held", term, backend] = _matrices_held(term, backend)
    results["twice"] = _differentiated_twice()
    torch.save(results, folder / "results.pt")


def _inputs(n: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    # Sharp, as trained ones are: many of the teacher's probabilities are under 1e-10.
    logits, teacher = (4 * torch.randn(n, vocabulary, generator=generator) for _ in range(2))
    return logits.to(dtype).requires_grad_(), teacher.to(dtype), torch.randint(vocabulary, (n,), generator=generator)


def _term(term: str, n: int, vocabulary: int, dtype: torch.dtype, backend) -> dict:
    logits, teacher, targets = _inputs(n, vocabulary, dtype)
    kept = logits.detach().clone(), teacher.clone()
    # A logit of its own between the loss and the leaf, as a head's output is.
    value = TERMS[term](logits * 1, teacher, targets, backend)
    gradient = torch.autograd.grad(3 * value, logits)[0]
    direct = TERMS[term](logits, teacher, targets, backend)
    unchanged = torch.equal(logits, kept[0]) and torch.equal(teacher, kept[1])
    return {"value": value.detach(), "gradient": gradient, "unchanged": unchanged, "direct": direct.detach()}


def _measured(backend) -> dict:
    logits, teacher, targets = _inputs(63, 1000, torch.float32)
    kept = logits.detach().clone()
    with torch.no_grad():
        values = [TERMS[term](logits, teacher, targets, backend) for term in ("ce", "kl at 2")]
    return {"values": values, "unchanged": torch.equal(logits, kept)}


def _objective(folder: Path, stage: str, trains: bool, backend) -> dict:
    """Loss, figures and gradients of a stage's objective, three tokens at a time."""
    torch.manual_seed(0)
    settings = replace(BASE, stage=stage, loss_chunk=3, temperature=1.5, kl_weight=0.5, loss_backend=backend)
    model = RecursiveForCausalLM.from_pretrained(folder / "recursive").train(trains)
    objective = {"heal": Heal, "exits": Exits}[stage](
        settings, AutoModelForCausalLM.from_pretrained(folder / "dense").requires_grad_(False)
    )
    objective.prepare(model)
    ids = random_ids(2, 11)
    labels = ids.clone()
    labels[0, :4] = IGNORED
    inputs = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(11).expand(2, -1)}
    with torch.set_grad_enabled(trains):
        arguments = objective.forward_arguments(model, model.config.num_recursions)
        outputs = model.model(ids, position_ids=inputs["position_ids"], use_cache=False, **arguments)
        total, sums = objective(model, outputs, inputs)
    if trains:
        total.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"total": total.detach(), "sums": sums, "gradients": gradients}


def _matrices_held(term: str, backend) -> float:
    """How many ``[n, V]`` float32 matrices are held at most besides the logits, forward and backward."""
    logits, teacher, targets = _inputs(63, 1000, torch.float32)
    leaf = logits.detach().requires_grad_()
    TERMS[term](leaf, teacher, targets, backend)
    with profile(profile_memory=True) as recorded:
        torch.autograd.grad(TERMS[term](leaf, teacher, targets, backend), leaf)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / leaf.nbytes


def _differentiated_twice() -> str:
    logits, teacher, _ = _inputs(1, 1000, torch.float32)
    value = forward_kl(logits, teacher, 1.0, "liger")
    torch.autograd.grad(value, logits, retain_graph=True)
    try:
        torch.autograd.grad(value, logits)
    except AssertionError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What :func:`compute` found under Triton's interpreter."""
    folder = tmp_path_factory.mktemp("fused")
    make_source(folder, num_recursions=4)
    paths = [str(Path(__file__).parent), python_path(), *sys.path]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    program = "import sys, pathlib, test_liger_losses as here; here.compute(pathlib.Path(sys.argv[1]))"
    ended = subprocess.run(
        [sys.executable, "-c", program, str(folder)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 0, ended.stderr
    return torch.load(folder / "results.pt", weights_only=False)


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("term", TERMS)
def test_kernels_give_the_torch_forms_losses_and_gradients(results, term, case):
    """To 1e-5, of losses and of gradients of size 1; gradients in bfloat16 to their last places."""
    wanted, found = (results["term", term, case, backend] for backend in BACKENDS)
    torch.testing.assert_close(found["value"], wanted["value"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["direct"], wanted["value"], rtol=1e-5, atol=1e-5)
    rtol = 1e-5 if case[-1] is torch.float32 else 1e-2
    torch.testing.assert_close(found["gradient"], wanted["gradient"], rtol=rtol, atol=1e-5)


@interpreted
def test_kernels_leave_the_logits_to_the_next_term(results):
    """They write gradients over their input, which must not be the model's logits nor the teacher's."""
    assert all(result["unchanged"] for key, result in results.items() if key[0] == "term")
    assert results["measured", "liger"]["unchanged"]


@interpreted
def test_measuring_takes_no_gradient(results):
    """Under ``no_grad`` the figures are those of torch, also for logits that could have a gradient."""
    wanted, found = (results["measured", backend]["values"] for backend in BACKENDS)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("stage", ["heal", "exits"])
def test_a_stage_is_the_same_with_either_backend(results, stage, trains):
    """Loss, every figure (first choices read from the same logits among them), every weight's gradient."""
    wanted, found = (results["objective", stage, trains, backend] for backend in BACKENDS)
    torch.testing.assert_close(found["total"], wanted["total"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["sums"], wanted["sums"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["gradients"], wanted["gradients"], rtol=1e-4, atol=1e-5)
    assert bool(found["gradients"]) == trains


@interpreted
def test_kernels_hold_fewer_copies_of_the_logits(results):
    """In float32 matrices of the logits' size, small change aside."""
    assert results["held", "ce", "liger"] < 1.1 < 2 < results["held", "ce", "torch"]
    assert results["held", "kl", "liger"] < 2.1 < 4 < results["held", "kl", "torch"]


@interpreted
def test_a_fused_kl_is_differentiated_once(results):
    """Its gradient is scaled in place, so a second time would be wrong and is refused."""
    assert results["twice"] == "a fused loss supports one backward pass"


def test_auto_is_torch_on_a_cpu(monkeypatch):
    """With liger-kernel installed or not."""
    for installed in (True, False):
        monkeypatch.setattr(liger_losses, "liger_is_installed", lambda installed=installed: installed)
        assert not liger_losses.uses_liger("auto", torch.zeros(1))
        liger_losses.check_backend("auto", torch.device("cpu"))


@pytest.mark.parametrize("installed", [True, False])
def test_auto_is_liger_on_a_gpu_that_has_it(monkeypatch, installed):
    """Asked of something that says it is on one."""
    monkeypatch.setattr(liger_losses, "liger_is_installed", lambda: installed)
    assert liger_losses.uses_liger("auto", SimpleNamespace(is_cuda=True)) == installed
    assert not liger_losses.uses_liger("torch", SimpleNamespace(is_cuda=True))


def test_liger_that_is_not_installed(tmp_path, monkeypatch):
    """Said before anything is read or written."""
    monkeypatch.setattr(liger_losses, "liger_is_installed", lambda: False)
    with pytest.raises(SettingsError, match=r"needs liger-kernel, .* Run: pip install 'recursify\[liger\]'"):
        uptrain_model(tmp_path / "model", tmp_path / "out", settings=replace(BASE, loss_backend="liger"))
    assert not (tmp_path / "out").exists()


def test_liger_without_a_gpu(monkeypatch):
    """Names the device, and what to use there."""
    monkeypatch.setattr(liger_losses, "liger_is_installed", lambda: True)
    with pytest.raises(SettingsError, match=r"needs a GPU .* device is 'cpu'\. Use loss_backend auto or torch"):
        liger_losses.check_backend("liger", torch.device("cpu"))


def test_unknown_loss_backend():
    """The message lists those there are."""
    with pytest.raises(SettingsError, match=r"Unknown loss_backend 'apex'\. Use one of: auto, torch, liger"):
        replace(BASE, loss_backend="apex")
