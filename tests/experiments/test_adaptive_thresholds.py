"""Thresholds learned in use: FREE's figures, the cases in which it degenerates, and decoding with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from helpers.early_exit import STEPS, generate, left_padded, tiny_exits
from recursify.experiments.adaptive_thresholds import (
    FREE_OTHER_CLASS,
    AdaptiveThresholds,
    beta_density,
    fit_beta,
    free_threshold,
    guarded_threshold,
)
from recursify.modeling import ExitSettings, make_policy


def two_classes(positive, negative, *, count=1000, share=0.8, seed=0):
    """Confidences from two Betas, the agreeing ones first, and which agree."""
    random = np.random.default_rng(seed)
    right = round(count * share)
    drawn = np.concatenate([random.beta(*positive, right), random.beta(*negative, count - right)])
    return torch.from_numpy(drawn), torch.arange(count) < right


@pytest.mark.parametrize(
    ("positive", "negative", "share", "threshold"),
    [
        ((5, 1), (2, 3), 0.8, 0.6333),
        ((5, 1), (2, 3), 0.2, 0.6333),
        ((8, 1), (1.2, 3), 0.8, 0.7),
        ((2, 1), (1.5, 1.5), 0.8, 0.4333),
    ],
)
def test_the_compatible_estimator_is_the_released_one(positive, negative, share, threshold):
    """What FREE's code says of the same samples; it does not know how frequent the classes are."""
    assert free_threshold(*two_classes(positive, negative, share=share)) == pytest.approx(threshold, abs=5e-5)


def test_the_compatible_estimator_before_any_sample():
    """The released starting values."""
    assert free_threshold(torch.empty(0), torch.empty(0, dtype=torch.bool)) == pytest.approx(0.4333, abs=5e-5)


def test_the_compatible_fit_is_the_released_one():
    """α = [2.100, 4.968] and β = [3.096, 1.004]: each class with a trace of the other."""
    confidence, agrees = two_classes((5, 1), (2, 3))
    fits = [fit_beta(confidence, torch.where(agrees == kind, 1.0, FREE_OTHER_CLASS)) for kind in (False, True)]
    assert [round(float(value), 3) for fit in fits for value in fit] == [2.100, 3.096, 4.968, 1.004]


def test_density_integrates_to_one_and_has_the_mean():
    """Of a Beta distribution, by the trapezoid rule."""
    x = torch.linspace(1e-4, 1 - 1e-4, 10_001, dtype=torch.float64)
    density = beta_density(x, x.new_tensor(2.5), x.new_tensor(4.0))
    assert_close(torch.trapezoid(density, x), x.new_tensor(1.0), atol=1e-5, rtol=0)
    assert_close(torch.trapezoid(density * x, x), x.new_tensor(2.5 / 6.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("target", [0.7, 0.9, 0.95])
def test_the_guarded_estimator_reaches_what_it_aims_for(share, target):
    """Of fresh samples of the same classes, that part agrees among those above; a lower threshold would fall short."""
    threshold = guarded_threshold(*two_classes((5, 1), (2, 3), share=share, count=4000), target)
    confidence, agrees = two_classes((5, 1), (2, 3), share=share, count=200_000, seed=1)
    assert 0 < threshold < 1
    reached = agrees[confidence > threshold].double().mean()
    if threshold > 1e-3:  # else all tokens leave, and more agree than asked
        assert float(reached) == pytest.approx(target, abs=0.02)
    assert float(reached) >= target - 0.02


def test_the_guarded_estimator_knows_how_frequent_classes_are():
    """The rarer agreement is, the surer a token has to be; FREE's does not move (above)."""
    rare, frequent = (guarded_threshold(*two_classes((5, 1), (2, 3), share=share)) for share in (0.2, 0.8))
    assert rare > frequent + 0.2


def test_inverted_classes_let_nothing_leave():
    """Where disagreement is the surer one no threshold helps, and FREE's estimator lets tokens leave all the same."""
    confidence, agrees = two_classes((2, 3), (5, 1), share=0.5)
    assert guarded_threshold(confidence, agrees) == 1.0
    assert free_threshold(confidence, agrees) < 0.9


def learned(thresholds: AdaptiveThresholds, confidence: torch.Tensor, agrees: torch.Tensor) -> float:
    thresholds.learn(0, confidence, agrees, torch.ones_like(agrees))
    thresholds.begin(1)
    return thresholds.threshold(0)


@pytest.mark.parametrize(
    ("confidence", "agrees"),
    [
        (torch.rand(1000), torch.ones(1000, dtype=torch.bool)),
        (torch.rand(5), torch.tensor([True, True, True, True, False])),
        (torch.rand(1000), torch.arange(1000) < 10),
    ],
    ids=["all agree", "four and one", "few agree"],
)
def test_too_few_of_a_class_leave_the_initial_threshold(confidence, agrees):
    """Where FREE's estimator ends at an end of its grid."""
    assert learned(AdaptiveThresholds(initial=0.77), confidence, agrees) == 0.77
    if bool(agrees.all()):
        assert learned(AdaptiveThresholds(compatible=True), confidence, agrees) == pytest.approx(0.3)


def test_confidences_that_are_all_alike_are_no_error():
    """A class without variance has a finite density all the same."""
    agrees = torch.arange(200) < 100
    threshold = learned(AdaptiveThresholds(), torch.where(agrees, 0.9, 0.2), agrees)
    assert 0.2 < threshold < 0.9


def test_old_samples_are_forgotten():
    """Only the newest of a window count, so the threshold follows the text."""
    easy, hard = two_classes((5, 1), (2, 3), share=0.9), two_classes((5, 1), (2, 3), share=0.2)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    thresholds = AdaptiveThresholds(window=1000)
    first = learned(thresholds, easy[0][order], easy[1][order])
    second = learned(thresholds, hard[0][order], hard[1][order])
    assert len(thresholds.samples(0)[0]) == 1000
    assert second == learned(AdaptiveThresholds(window=1000), hard[0][order], hard[1][order]) > first


def test_learning_ends_after_so_many_sequences():
    """FREE freezes its threshold after 300."""
    thresholds = AdaptiveThresholds(compatible=True, num_sequences=2)
    confidence, agrees = two_classes((5, 1), (2, 3))
    assert learned(thresholds, confidence, agrees) == pytest.approx(0.6333, abs=5e-5)
    thresholds.begin(2)
    assert not thresholds.learning
    assert learned(thresholds, *two_classes((2, 1), (1.5, 1.5))) == pytest.approx(0.6333, abs=5e-5)
    assert AdaptiveThresholds(compatible=True).num_sequences == 300


@pytest.mark.parametrize("layers", [None, (2, 4)])
@pytest.mark.parametrize("recursions", [2, 4])
def test_decoding_learns_what_the_whole_model_says(recursions, layers):
    """Every token that ran all layers counts once per exit that it came by, with the label of one full forward."""
    model = tiny_exits(recursions=recursions)
    thresholds = AdaptiveThresholds(initial=0.02, minimum=2)
    settings = ExitSettings(make_policy("confidence"), adapt=thresholds, max_pending=5, layers=layers)
    ids, mask = left_padded((9, 4, 7))
    output = generate(model, ids, mask, exit_policy=settings, return_dict_in_generate=True)
    text_mask = torch.cat([mask, torch.ones(3, STEPS, dtype=torch.long)], dim=1)
    full = model(output.sequences, attention_mask=text_mask, position_ids=(text_mask.cumsum(-1) - 1).clamp(min=0))
    choices = full.logits.argmax(-1)

    num_exits = recursions - 1 if layers is None else len(layers)
    passed, right, wrong = ([0] * num_exits for _ in range(3))
    for row, left in enumerate(output.exit_depths.tolist()):
        last = max(step for step in range(1, STEPS) if left[step] == num_exits)  # all before it have run all layers
        for step in range(1, last + 1):
            for depth in range(min(left[step] + 1, num_exits)):
                passed[depth] += 1
            if left[step] < num_exits:  # then what the exit said is the next token
                column = ids.shape[1] + step - 1
                agrees = bool(output.sequences[row, column + 1] == choices[row, column])
                right[left[step]] += agrees
                wrong[left[step]] += not agrees
    thresholds.begin(0)
    for depth in range(num_exits):
        confidence, agrees = thresholds.samples(depth)
        assert len(confidence) == len(agrees) == passed[depth] > 20
        assert right[depth] + wrong[depth] > 3
        # The others did not leave by this exit, and what it said of them is not on record.
        assert right[depth] <= int(agrees.sum()) <= passed[depth] - wrong[depth]
        assert thresholds.threshold(depth) != 0.02


def test_learning_changes_no_token_of_the_call():
    """Thresholds move between calls only, and reading out more than before moves nothing."""
    model = tiny_exits()
    ids, mask = left_padded((9, 4))
    fixed = generate(model, ids, mask, exit_policy=ExitSettings(make_policy("head", 0.5)))
    learning = ExitSettings(make_policy("head"), adapt=AdaptiveThresholds(initial=0.5))
    assert torch.equal(fixed, generate(model, ids, mask, exit_policy=learning))


def test_rows_share_what_they_learn():
    """A batch feeds the same estimate as its rows one by one."""
    model = tiny_exits(recursions=2)
    ids, mask = left_padded((9, 4))
    together, apart = (AdaptiveThresholds(initial=0.02, minimum=2) for _ in range(2))
    generate(model, ids, mask, exit_policy=ExitSettings(make_policy("confidence"), adapt=together))
    first = AdaptiveThresholds(initial=0.02, minimum=2)
    for row, length in enumerate((9, 4)):
        settings = ExitSettings(make_policy("confidence"), adapt=first)
        generate(model, ids[row : row + 1, -length:], exit_policy=settings)
        first.begin(0)
        apart.learn(0, *first.samples(0), torch.ones_like(first.samples(0)[1]))
        first = AdaptiveThresholds(initial=0.02, minimum=2)
    together.begin(0)
    apart.begin(0)
    assert_close(together.samples(0)[0].sort().values, apart.samples(0)[0].sort().values, atol=1e-4, rtol=0)
    assert together.threshold(0) == pytest.approx(apart.threshold(0), abs=1e-2)


def test_bad_settings_are_one_clear_error():
    """Targets that are no part, estimates without samples, modes in which nothing could be learned."""
    with pytest.raises(ValueError, match=r"above 0 and below 1, got 1\.2"):
        AdaptiveThresholds(1.2)
    with pytest.raises(ValueError, match="2 samples of each class"):
        AdaptiveThresholds(minimum=1)
    with pytest.raises(ValueError, match="policy 'confidence' with kv 'copied' does not have these"):
        ExitSettings(make_policy("confidence"), kv="copied", adapt=AdaptiveThresholds())
    with pytest.raises(ValueError, match="policy 'fixed'"):
        ExitSettings(make_policy("fixed"), adapt=AdaptiveThresholds())
    model = tiny_exits(recursions=2)
    ids, mask = left_padded((5, 4))
    unlike = [ExitSettings(make_policy("confidence"), adapt=AdaptiveThresholds()) for _ in range(2)]
    with pytest.raises(ValueError, match="share one kind of policy, vocabulary, kv, layers and adapt"):
        generate(model, ids, mask, exit_policy=unlike)
