"""Token windows: they begin as the tokenizer begins a text, for every command that reads text."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from helpers.early_exit import tiny_exits
from helpers.tiny_models import byte_tokenizer, convert_tiny, save_tiny, tiny_dense
from recursify.bench.plan import BenchPlan
from recursify.bench.settings import BenchSettings
from recursify.checkpoint.dense_checkpoint import open_checkpoint
from recursify.checkpoint.layerwise import Layerwise
from recursify.convert.calibration import Calibration
from recursify.convert.pipeline import convert_model
from recursify.convert.plan import make_plan
from recursify.convert.settings import ConversionSettings
from recursify.errors import TextError
from recursify.evaluation.evaluate import evaluate_model
from recursify.evaluation.exit_calibration import calibrate_on_windows
from recursify.evaluation.settings import ExitCalibrationSettings
from recursify.evaluation.text import Text, default_text, num_context, text_start, token_windows

TEMPLATES = {None: [], "<s> $A": [1], "<s> <pad> $A": [1, 0], "<s> $A <pad>": [1], "$A <pad>": []}
"""What a tokenizer adds, and the ids that begin a text with it."""


@pytest.mark.parametrize(("template", "start"), TEMPLATES.items())
def test_windows_begin_as_a_text_does(template, start):
    """The beginning stands before every window, within its length; the rest is the text, in order and whole."""
    tokenizer = byte_tokenizer(template)
    assert text_start(tokenizer) == start
    windows = token_windows(tokenizer, Text("t", ["abcdefghij" * 10]), 12, max_tokens=60)
    assert windows.shape == (5, 12)
    assert windows.dtype == torch.int64
    assert windows[:, : len(start)].tolist() == [start] * 5
    body = windows[:, len(start) :].flatten().tolist()
    assert body == tokenizer("abcdefghij" * 10, add_special_tokens=False)["input_ids"][: len(body)]


def test_a_window_needs_room_for_text():
    """A length that the beginning fills."""
    with pytest.raises(TextError, match=r"A window of 2 tokens has no room after the 2 that begin a text\. Use more"):
        token_windows(byte_tokenizer("<s> <pad> $A"), default_text("held_out"), 2)


def loss_by_hand(model, tokenizer, start: list[int], text: str, length: int) -> float:
    """Mean loss of plain transformers over ``start + window``, of the tokens of the text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    step, losses = length - len(start), []
    for first in range(0, len(ids) - step + 1, step):
        window = torch.tensor([start + ids[first : first + step]])
        logprobs = model(window).logits[0].log_softmax(-1)
        losses += [
            -float(logprobs[place - 1, window[0, place]]) for place in range(max(1, len(start)), window.shape[1])
        ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("template", "start"), TEMPLATES.items())
@torch.inference_mode()
def test_perplexity_is_that_of_transformers(tmp_path, template, start):
    """The loss by hand, over the beginning and a window; special tokens are context and never targets."""
    dense, tokenizer = tiny_dense("llama"), byte_tokenizer(template)
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    text = "".join(chr(ord("a") + index * index % 26) for index in range(300))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    found = evaluate_model(tmp_path / "dense", data=[str(tmp_path / "text.txt")], length=32)
    assert found.model.loss == pytest.approx(loss_by_hand(dense, tokenizer, start, text, 32), rel=1e-5)
    assert found.num_tokens == 300 // (32 - len(start)) * (32 - max(1, len(start)))
    assert found.to_dict()["window_start"] == [{0: "<pad>", 1: "<s>"}[token] for token in start]


@torch.inference_mode()
def test_conversion_is_checked_with_bos(tmp_path):
    """The dense control's perplexity after ``convert`` is that of ``<s>`` and the windows in plain transformers."""
    dense = tiny_dense("llama")
    dense.save_pretrained(tmp_path / "dense")
    byte_tokenizer("<s> $A").save_pretrained(tmp_path / "dense")
    result = convert_model(tmp_path / "dense", tmp_path / "out", calibration_tokens=512, calibration_length=64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "\n\n".join(default_text("held_out").documents)[: 8 * 255]
    assert result.check.comparison.control.loss == pytest.approx(
        loss_by_hand(dense, tokenizer, [1], text, 256), rel=1e-5
    )
    calibration = json.loads((tmp_path / "out" / "recursify.json").read_text(encoding="utf-8"))["calibration"]
    assert calibration["window_start"] == ["<s>"]
    assert calibration["window"] == 64
    assert calibration["num_tokens"] == 512


@pytest.mark.parametrize("settings", [{}, {"initialization": "fisher", "relaxation": "svd"}])
def test_calibration_sees_bos(tmp_path, monkeypatch, settings):
    """Its moments are those of the windows with BOS, on the dense and on the converted side."""
    tiny_dense("llama").save_pretrained(tmp_path / "dense")
    byte_tokenizer("<s> $A").save_pretrained(tmp_path / "dense")
    checkpoint = open_checkpoint(tmp_path / "dense")
    chosen = ConversionSettings(calibration_tokens=256, calibration_length=32, lora_rank=2, **settings)
    plan = make_plan(checkpoint, chosen, has_text=True)
    calibration = Calibration(checkpoint, plan, default_text("calibration"), lambda *_: None)
    assert calibration.windows.shape == (8, 32)
    assert calibration.windows[:, 0].tolist() == [1] * 8
    assert 1 not in calibration.windows[:, 1:]
    embedded, embed = [], Layerwise.embed
    monkeypatch.setattr(Layerwise, "embed", lambda dense, windows: embedded.append(windows) or embed(dense, windows))
    with torch.no_grad():
        next(calibration.tied_linears("measure"))
    assert torch.equal(torch.cat(embedded), calibration.windows)


def test_exits_are_calibrated_on_tokens_of_the_text():
    """Of a beginning of two tokens, the second is not among the predictions."""
    model, tokenizer = tiny_exits(), byte_tokenizer("<s> <pad> $A")
    windows = token_windows(tokenizer, default_text("held_out"), 66, max_tokens=66 * 16)
    settings = ExitCalibrationSettings(policy="confidence")
    found = calibrate_on_windows(model, windows, settings, num_context=num_context(tokenizer))
    assert found.num_tokens == 16 * 64 // 2


def test_prompts_of_the_benchmark_begin_with_bos(tmp_path):
    """As prompts of users do."""
    sources = BenchPlan(tiny_exits(), byte_tokenizer("<s> $A <pad>"), BenchSettings(prompt=8)).sources
    assert {source[0] for source in sources} == {1}
    assert {len(source) for source in sources} == {8}
    assert not any({0, 1} & set(source[1:]) for source in sources)


def test_tokenizer_larger_than_the_model(tmp_path):
    """Entries that no text uses are accepted; one that is used is named with both sizes, and nothing is written."""
    dense = save_tiny(tmp_path / "dense")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<unused{index}>" for index in range(40)])
    assert len(tokenizer) > dense.config.vocab_size
    tokenizer.save_pretrained(tmp_path / "dense")
    convert_tiny(tmp_path / "dense", tmp_path / "out")
    (tmp_path / "plain.txt").write_text("a text of plain letters " * 40, encoding="utf-8")
    (tmp_path / "used.txt").write_text("a text of <unused39> letters " * 40, encoding="utf-8")
    assert evaluate_model(tmp_path / "out", data=[str(tmp_path / "plain.txt")], length=32).num_tokens
    message = r"tokenizer has 298 entries, and token 297 \('<unused39>'\) is not in the model's vocabulary of 260"
    used = [str(tmp_path / "used.txt")]
    with pytest.raises(TextError, match=message):
        evaluate_model(tmp_path / "out", data=used, length=32)
    with pytest.raises(TextError, match=message):
        convert_model(tmp_path / "dense", tmp_path / "other", calibration_data=used, calibration_length=32)
    assert not (tmp_path / "other").exists()


def test_checked_text_is_read_before_the_conversion(tmp_path):
    """A conversion without calibration fails before anything is written, too."""
    tiny_dense("llama", vocab_size=40).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(TextError, match=r"tokenizer has 258 entries, and token .* model's vocabulary of 40 entries"):
        convert_model(tmp_path / "dense", tmp_path / "out", calibration_data=(), relaxation="svd", check=True)
    assert not (tmp_path / "out").exists()
