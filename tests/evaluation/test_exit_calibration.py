"""Thresholds for a target agreement: by hand, against brute force, and through the command into ``generate``."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from helpers.command_line import run
from helpers.early_exit import tiny_exits
from helpers.tiny_models import byte_tokenizer, random_ids
from recursify.errors import SettingsError, TextError
from recursify.evaluation.exit_calibration import calibrate_on_windows
from recursify.evaluation.exit_thresholds import (
    ExitPredictions,
    apply_thresholds,
    choose_thresholds,
    exit_contexts,
    predict_at_exits,
)
from recursify.evaluation.settings import ExitCalibrationSettings
from recursify.modeling import ExitSettings, RecursiveConfig, RecursiveForCausalLM, make_policy

ABLE = ("head", "confidence", "entropy", "saturation", "convergence", "divergence")


def one_exit(confidences: list[float], agrees: list[int]) -> ExitPredictions:
    return ExitPredictions(torch.tensor([confidences]), torch.tensor([agrees]).bool())


def test_one_exit_by_hand():
    """Ten tokens, a budget of one disagreement: all above the second that disagrees leave."""
    read = one_exit([0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], [1, 1, 0, 1, 1, 0, 1, 1, 0, 1])
    assert choose_thresholds(read, 0.9, -1.0) == pytest.approx([0.6])
    outcome = apply_thresholds(read, [0.6], 0.9)
    assert outcome.agreement == pytest.approx(0.9)
    assert outcome.mean_depth == pytest.approx(0.5)
    assert outcome.exit_fractions == pytest.approx([0.5])
    assert choose_thresholds(read, 0.999, -1.0) == pytest.approx([0.85])
    assert choose_thresholds(read, 0.5, -1.0) == [-1.0], "all may leave"
    ties = one_exit([0.9, 0.5, 0.5, 0.5], [1, 1, 0, 1])
    assert choose_thresholds(ties, 0.9, -1.0) == pytest.approx([0.5]), "what is as sure as the wrong one stays with it"


def test_exits_share_the_budget():
    """Two exits, four disagreements: two each; what the first leaves over goes to the second."""
    torch.manual_seed(0)
    read = ExitPredictions(torch.rand(2, 400), torch.rand(2, 400) < 0.8)
    thresholds = choose_thresholds(read, 0.99, -1.0)
    outcome = apply_thresholds(read, thresholds, 0.99)
    assert outcome.agreement >= 0.99
    assert min(outcome.exit_fractions) > 0
    perfect = ExitPredictions(read.confidences, torch.stack([torch.ones(400).bool(), read.agrees[1]]))
    assert choose_thresholds(perfect, 0.99, -1.0)[0] == -1.0
    # No lower threshold of either exit alone would do.
    for depth in range(2):
        lower = list(thresholds)
        below = read.confidences[depth][read.confidences[depth] < thresholds[depth]]
        lower[depth] = float(below.max()) - 1e-6
        assert sum(apply_thresholds(read, lower, 0.99).exit_fractions) > sum(outcome.exit_fractions)


@torch.inference_mode()
def test_boundaries_have_what_the_exits_and_the_whole_model_say():
    """Logits of a fixed depth, and of all recursions, at every token that another follows."""
    model = tiny_exits(recursions=4)
    windows = random_ids(2, 12)
    boundaries, last_states = exit_contexts(model, windows)
    assert [each.depth for each in boundaries] == [0, 1, 2]
    for each in boundaries:
        expected = model(windows, exit_depth=each.depth).logits[:, :-1].flatten(0, 1)
        torch.testing.assert_close(each.logits, expected)
    torch.testing.assert_close(model.compute_logits(last_states), model(windows).logits[:, :-1].flatten(0, 1))


@pytest.mark.parametrize(
    ("policy", "vocabulary"), [*((name, None) for name in ABLE), ("confidence", 50), ("divergence", 50)]
)
def test_a_text_is_read_as_decoding_reads_it(policy, vocabulary):
    """Without the coda, confidences over a text are those that decoding has at the same tokens."""
    model = tiny_exits(recursions=4, through_coda=False)
    windows = random_ids(2, 12)
    read = predict_at_exits(model, windows, make_policy(policy, vocabulary=vocabulary))
    assert torch.equal(read.agrees, predict_at_exits(model, windows, make_policy(policy)).agrees)
    assert read.confidences.shape == (3, 22)
    seen: list[torch.Tensor] = []

    class Watching(type(make_policy(policy))):  # type: ignore[misc]
        def confidence(self, boundary):
            seen.append(super().confidence(boundary))
            return torch.full_like(seen[-1], -2.0)

    from recursify.modeling import DepthDecoder

    settings = ExitSettings(Watching(make_policy(policy).threshold, vocabulary))
    decoder = DepthDecoder(model, [settings] * 2, torch.ones(2, 3, dtype=torch.long), max_length=12)
    with torch.no_grad():
        decoder.prefill(windows[:, :3])
        for token in windows[:, 3:11].T:
            decoder.step(token, [0, 1], torch.ones(2, dtype=torch.bool))
    found = torch.stack(seen).view(8, 3, 2).permute(1, 2, 0)
    torch.testing.assert_close(found.float(), read.confidences.view(3, 2, 11)[:, :, 3:], atol=1e-4, rtol=1e-4)


def test_agreement_is_that_of_the_last_recursion():
    """At every exit, and a target is met on the tokens that thresholds were chosen by."""
    model = tiny_exits(recursions=4)
    windows = random_ids(8, 80)
    read = predict_at_exits(model, windows, make_policy("confidence"))
    with torch.no_grad():
        last = model(windows).logits[:, :-1].argmax(-1).flatten()
        for depth in range(3):
            says = model(windows, exit_depth=depth).logits[:, :-1].argmax(-1).flatten()
            assert torch.equal(read.agrees[depth], says == last)
    found = calibrate_on_windows(model, windows, ExitCalibrationSettings(policy="confidence", target_agreement=0.8))
    assert found.chosen.agreement >= 0.8
    assert found.num_tokens == 8 * 79 // 2
    agreements = [each.agreement for each in found.curve]
    assert agreements[-1] > agreements[0]


def test_the_command_writes_what_generate_takes(tmp_path, capsys):
    """Into config.json and recursify.json; a policy's name then means those thresholds."""
    model = tiny_exits(recursions=2)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and the dog ran. " * 60, encoding="utf-8")
    command = ("calibrate-exits", tmp_path / "model", "--policy", "confidence", "--data", tmp_path / "text.txt")
    more = ("--length", 64, "--target-agreement", 0.7)
    before = (tmp_path / "model" / "config.json").read_text(encoding="utf-8")
    assert run(*command, *more, "--dry-run") == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert (tmp_path / "model" / "config.json").read_text(encoding="utf-8") == before
    assert run(*command, *more, "--json", "--plot", tmp_path / "curve.svg") == 0
    facts = json.loads(capsys.readouterr().out)
    assert "agreement with the full model" in (tmp_path / "curve.svg").read_text(encoding="utf-8")
    loaded = RecursiveForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert (loaded.config.exit_policy, loaded.config.exit_thresholds) == ("confidence", facts["chosen"]["thresholds"])
    assert ExitSettings.from_options("confidence", config=loaded.config).policy.thresholds(1) == tuple(
        facts["chosen"]["thresholds"]
    )
    assert ExitSettings.from_options("entropy", config=loaded.config).policy.thresholds(1) == (0.9,)
    record = json.loads((tmp_path / "model" / "recursify.json").read_text(encoding="utf-8"))
    assert record["exit_calibration"]["held_out"] == facts["held_out"]
    named = (
        "generate",
        tmp_path / "model",
        "the cat",
        "--exit",
        "confidence",
        "--max-new-tokens",
        20,
        "--json",
        "--stats",
    )
    assert run(*named) == 0
    by_name = json.loads(capsys.readouterr().out)
    assert run(*named, "--threshold", facts["chosen"]["thresholds"][0]) == 0
    assert by_name["exits"]["histogram"] == json.loads(capsys.readouterr().out)["exits"]["histogram"]
    shutil.rmtree(tmp_path / "model")


@pytest.mark.parametrize(
    ("policy", "target", "message"),
    [
        ("oracle", 0.9, "Policy 'oracle' has no confidence to set a threshold on"),
        ("sure", 0.9, r"Use one of: head, confidence, entropy, saturation, convergence, divergence\."),
        ("confidence", 1.0, r"target_agreement must be a number above 0 and below 1, got 1\.0"),
        ("head", 0.9, "Policy 'head' needs exit heads, and the model has none"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(policy, target, message):
    """One clear error each."""
    model = tiny_exits(recursions=2, heads=False)
    with pytest.raises(SettingsError, match=message):
        calibrate_on_windows(model, random_ids(8, 80), ExitCalibrationSettings(policy=policy, target_agreement=target))


def test_too_little_text_and_thresholds_that_do_not_fit_are_refused():
    """Half of the tokens are for trying thresholds; a config has one per exit."""
    model = tiny_exits(recursions=2)
    with pytest.raises(TextError, match=r"has 38 tokens to predict, and 512 are needed"):
        calibrate_on_windows(model, random_ids(2, 20), ExitCalibrationSettings(policy="confidence"))
    fields = {**model.config.to_dict(), "exit_policy": "confidence", "exit_thresholds": [0.5, 0.6]}
    with pytest.raises(ValueError, match="exit_thresholds has 2 values, and the model 1 exits"):
        RecursiveConfig(**fields)
