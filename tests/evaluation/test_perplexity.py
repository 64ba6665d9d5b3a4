"""Perplexity: the value of plain transformers, and memory that does not grow with vocabulary or window."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from helpers.early_exit import tiny_exits
from helpers.tiny_models import random_ids, tiny_dense, tiny_recursive
from recursify.evaluation import exit_thresholds
from recursify.evaluation import perplexity as measured
from recursify.evaluation.exit_thresholds import predict_at_exits
from recursify.evaluation.perplexity import compare, perplexity, precompute_states
from recursify.modeling import make_policy


@pytest.fixture
def largest(monkeypatch):
    """Function that bounds the bytes of logits, and returns the list of the sizes of the logits that are made."""

    def bound(model, limit: int) -> list[int]:
        monkeypatch.setattr(measured, "LOGIT_BYTES", limit)
        monkeypatch.setattr(exit_thresholds, "LOGIT_BYTES", limit)
        sizes: list[int] = []
        model.get_output_embeddings().register_forward_hook(lambda *args: sizes.append(4 * args[-1].numel()))
        return sizes

    return bound


def loss_by_hand(logits, windows, num_context=1):
    logprobs = logits.float().log_softmax(-1)[:, num_context - 1 : -1]
    return F.nll_loss(logprobs.flatten(0, 1), windows[:, num_context:].flatten()).item()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("num_context", [1, 3])
def test_bounded_logits(family, num_context, largest):
    """Chunks of a window of 48 tokens over 5,000 entries: at most the bound, the loss of plain transformers."""
    model, windows = tiny_dense(family, vocab_size=5000), random_ids(3, 48, vocab_size=5000)
    with torch.inference_mode():
        expected = loss_by_hand(model(windows).logits, windows, num_context)
    sizes = largest(model, 4 * 5000 * 10)
    found = perplexity(model, windows, num_context=num_context)
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert found.num_tokens == 3 * (48 - num_context)
    assert 0 < max(sizes) <= 4 * 5000 * 10
    assert "forward" not in vars(model.base_model)


def test_one_pass_of_the_layers(largest):
    """Chunks of logits do not run the layers again."""
    model, windows = tiny_dense("llama", vocab_size=5000), random_ids(1, 48, vocab_size=5000)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    sizes = largest(model, 4 * 5000 * 10)
    perplexity(model, windows)
    assert len(sizes) == 5
    assert len(calls) == 1


def test_short_windows_are_bounded_too(largest):
    """Many windows of two tokens."""
    model = tiny_dense("llama", vocab_size=5000)
    sizes = largest(model, 4 * 5000 * 10)
    assert perplexity(model, random_ids(64, 2, vocab_size=5000)).num_tokens == 64
    assert max(sizes) <= 4 * 5000 * 10


@pytest.mark.parametrize("depth", [None, 0])
def test_comparison_in_chunks(depth, largest):
    """All figures of the whole windows, early exits and a model compared with itself included."""
    model = tiny_recursive("llama", varied=True)
    windows = random_ids(2, 40)
    whole = compare(model, model, windows, depth=depth)
    sizes = largest(model, 4 * 260 * 7)
    parts = compare(model, model, windows, depth=depth)
    assert max(sizes) <= 4 * 260 * 7
    assert parts.model.loss == pytest.approx(whole.model.loss, rel=1e-6)
    assert parts.control.loss == pytest.approx(whole.control.loss, rel=1e-6)
    assert parts.top1_agreement == whole.top1_agreement
    assert parts.kl == pytest.approx(whole.kl, rel=1e-5, abs=1e-7)
    with torch.inference_mode():
        exit_depth = {} if depth is None else {"exit_depth": depth}
        assert parts.model.loss == pytest.approx(loss_by_hand(model(windows, **exit_depth).logits, windows), rel=1e-6)


@pytest.mark.parametrize("limit", [2**20, 4 * 260 * 7])
def test_states_computed_beforehand(family, limit, largest):
    """The same figures, as often as they are asked for, from a control whose layers are gone."""
    model, control, windows = tiny_recursive(family, varied=True), tiny_dense(family), random_ids(5, 40)
    largest(model, limit)
    expected = compare(model, control, windows, num_context=2)
    reports = []
    precompute_states(control, windows, progress=lambda *report: reports.append(report))
    assert reports[-1][0] == "measure dense"
    assert reports[-1][1] == reports[-1][2]
    assert sum(parameter.numel() for parameter in control.parameters()) <= 261 * 32
    assert compare(model, control, windows, num_context=2) == expected
    assert compare(model, control, windows, num_context=2) == expected


def test_one_batch_is_one_call(largest):
    """Where the logits of a batch fit, the value is that of one plain call, to the bit."""
    model, windows = tiny_dense("llama"), random_ids(4, 32)
    sizes = largest(model, 4 * 4 * 32 * 260)
    loss = perplexity(model, windows).loss
    assert sizes == [4 * 4 * 32 * 260]
    with torch.inference_mode():
        logprobs = model(windows, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    assert loss == -float(logprobs.gather(-1, windows[:, 1:].reshape(-1, 1)).double().sum()) / (4 * 31)


def test_logits_of_exits_are_bounded(largest):
    """Thresholds: all exits of a chunk together."""
    model, windows, policy = tiny_exits(), random_ids(2, 64), make_policy("confidence")
    whole = predict_at_exits(model, windows, policy)
    sizes = largest(model, 4 * 260 * 20)
    parts = predict_at_exits(model, windows, policy)
    assert max(sizes) <= 4 * 260 * 20
    assert torch.equal(parts.agrees, whole.agrees)
    torch.testing.assert_close(parts.confidences, whole.confidences)
