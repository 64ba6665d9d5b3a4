"""Back to stock: what is exported computes the same, in stock libraries alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.tiny_models import convert_tiny, random_ids, save_tiny
from recursify.convert.export import PEFT_FAMILIES, check_export, export_model, stock_config
from recursify.errors import CheckpointError, ParityError, PlanError
from recursify.modeling import LayerLayout, RecursiveConfig


@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
@pytest.mark.parametrize("tie_norms", [False, True])
def test_every_sharing_unrolls(tmp_path, sharing, tie_norms):
    """Qwen2, which has biases and norms."""
    save_tiny(tmp_path / "dense", "qwen2")
    convert_tiny(tmp_path / "dense", tmp_path / "recursive", sharing=sharing, lora_rank=4, tie_norms=tie_norms)
    assert export_model(tmp_path / "recursive", tmp_path / "out").max_logit_difference < 1e-4


def test_unrolled_full_rank_is_the_dense_model(tmp_path):
    """There and back again: the weights come home."""
    dense = save_tiny(tmp_path / "dense")
    convert_tiny(tmp_path / "dense", tmp_path / "recursive", lora_rank="full")
    export_model(tmp_path / "recursive", tmp_path / "out", check=False)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, one), two in zip(dense.named_parameters(), back.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0, msg=name)


def test_unrolled_loads_where_recursify_is_absent(tmp_path):
    """No remote code, no package."""
    save_tiny(tmp_path / "dense")
    convert_tiny(tmp_path / "dense", tmp_path / "recursive", lora_rank=4)
    export_model(tmp_path / "recursive", tmp_path / "out", check=False)
    script = (
        "import sys; sys.modules['recursify'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "assert type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__ == 'LlamaForCausalLM'"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "out"], check=True, capture_output=True)
    assert not list((tmp_path / "out").glob("*.py"))


def test_rotary_fraction_for_llama_cpp(tmp_path):
    """``rotary_pct``, without which llama.cpp's converter stops, or takes 0.25; transformers loads the same model."""
    save_tiny(tmp_path / "dense", "gpt_neox", rotary_pct=0.5)
    convert_tiny(tmp_path / "dense", tmp_path / "recursive", lora_rank=4)
    export_model(tmp_path / "recursive", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rotary_pct"] == 0.5
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["partial_rotary_factor"] == 0.5
    cohere = AutoConfig.for_model("cohere2", num_hidden_layers=4)
    assert stock_config(RecursiveConfig.from_dense(cohere, LayerLayout.fold(4, 2, "cycle"))).rotary_pct == 1.0


@pytest.mark.parametrize("family", PEFT_FAMILIES)
@pytest.mark.parametrize("rank", [0, 5])
def test_peft_export(tmp_path, family, rank):
    """Stock model plus stock adapter: equal logits, decoding with a cache, weights stored once."""
    from peft import PeftModel

    save_tiny(tmp_path / "dense", family)
    model = convert_tiny(
        tmp_path / "dense", tmp_path / "recursive", sharing="cycle", lora_rank=rank, num_recursions=3,
        lora_rank_pattern={"mlp.down_proj": 3} if rank else {},
    )  # fmt: skip
    assert export_model(tmp_path / "recursive", tmp_path / "out", format="peft").max_logit_difference < 1e-5
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.config.num_hidden_layers == 2
    stock = PeftModel.from_pretrained(stock, str(tmp_path / "out" / "adapter")).eval()
    ids = random_ids(2, 11)
    written = stock.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(written, model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))


def test_peft_refuses_what_it_cannot_repeat(tmp_path):
    """Unshared ends, a sequence, and families whose layers peft repeats wrongly; with what to use instead."""
    save_tiny(tmp_path / "llama")
    save_tiny(tmp_path / "gemma3", "gemma3_text")
    for name, sharing, message in (
        ("llama", "middle_cycle", r"this one is 1 \+ \(2 layers × 2\) \+ 1 in cycle order.*Use --format dense"),
        ("llama", "sequence", "in sequence order"),
        ("gemma3", "cycle", "does not support 'gemma3_text'"),
    ):
        convert_tiny(tmp_path / name, tmp_path / "recursive", sharing=sharing, lora_rank=4)
        with pytest.raises(PlanError, match=message):
            export_model(tmp_path / "recursive", tmp_path / "out", format="peft")


def test_an_export_that_differs_is_caught(tmp_path):
    """The check is not a formality: a weight changed after the export fails it."""
    save_tiny(tmp_path / "dense")
    convert_tiny(tmp_path / "dense", tmp_path / "recursive", lora_rank=4)
    export_model(tmp_path / "recursive", tmp_path / "out", check=False)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        stock.model.layers[3].mlp.up_proj.weight.mul_(1.05)
    stock.save_pretrained(tmp_path / "out")
    with pytest.raises(ParityError, match="is wrong: its logits differ from those of"):
        check_export(tmp_path / "recursive", tmp_path / "out", "dense")


def test_result_of_an_export(tmp_path):
    """Typed, for strings and paths; an unknown format and a dense model are refused."""
    save_tiny(tmp_path / "dense")
    convert_tiny(tmp_path / "dense", tmp_path / "recursive", lora_rank=4)
    result = export_model(str(tmp_path / "recursive"), str(tmp_path / "out"))
    assert (result.output, result.format, result.architecture) == (tmp_path / "out", "dense", "LlamaForCausalLM")
    assert result.max_logit_difference < 1e-4
    assert result.to_dict()["bytes"] == result.num_bytes
    assert export_model(tmp_path / "recursive", tmp_path / "again", check=False).max_logit_difference is None
    with pytest.raises(PlanError, match=r"Unknown format 'gguf'\. Use one of: dense, peft"):
        export_model(tmp_path / "recursive", tmp_path / "other", format="gguf")
    with pytest.raises(CheckpointError, match="is not a recursive model"):
        export_model(tmp_path / "dense", tmp_path / "other")
