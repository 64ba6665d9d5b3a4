"""Tools that take a recursive model as they take any other: TRL, peft, torchao. lm-eval is in test_tasks.py."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, TorchAoConfig
from trl import SFTConfig, SFTTrainer

from helpers.tiny_models import convert_tiny, random_ids, save_tiny
from helpers.tolerances import LOGITS
from recursify.modeling import RecursiveForCausalLM

TEXTS = ["the cat sat on the mat", "a dog ran after the cat", "the mat was red"] * 4


@pytest.fixture(scope="module")
def recursive(tmp_path_factory):
    """A folder with a recursive model; wide enough for torchao's kernels."""
    home = tmp_path_factory.mktemp("clients")
    save_tiny(home / "dense", hidden_size=64, intermediate_size=128, head_dim=16)
    convert_tiny(home / "dense", home / "recursive", lora_rank=4, num_prelude_layers=1, num_coda_layers=1)
    return home / "recursive"


def tokenizer_of(folder):
    """The byte tokenizer, which has no end of text, and TRL wants one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<s>"
    return tokenizer


def sft_arguments(folder, **more) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        **more,
    )


def test_sft_trainer(recursive, tmp_path):
    """TRL trains all weights, shared ones once, and what it saves loads again."""
    model = RecursiveForCausalLM.from_pretrained(recursive)
    before = model.model.block[0].self_attn.q_proj.linear.weight.detach().clone()
    trainer = SFTTrainer(
        model=model,
        args=sft_arguments(tmp_path / "run"),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer_of(recursive),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    assert not torch.equal(model.model.block[0].self_attn.q_proj.linear.weight, before)
    trainer.save_model(str(tmp_path / "saved"))
    ids = random_ids(2, 7)
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        assert torch.equal(RecursiveForCausalLM.from_pretrained(tmp_path / "saved").eval()(ids).logits, wanted)


def test_lora_by_peft(recursive, tmp_path):
    """One adapter for all depths of a shared map: trained, saved, loaded, and merged without a difference."""
    model = RecursiveForCausalLM.from_pretrained(recursive)
    targets = model.lora_targets("q_proj", "down_proj")
    assert len(targets) == 2 * (1 + 2 + 1)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    trainer = SFTTrainer(
        model=adapted,
        args=sft_arguments(tmp_path / "run"),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer_of(recursive),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    ids = random_ids(2, 7)
    with torch.no_grad():
        plain = RecursiveForCausalLM.from_pretrained(recursive).eval()
        before = plain(ids).logits
        wanted = adapted.eval()(ids).logits
        assert not torch.allclose(wanted, before, atol=1e-3)
        loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(ids).logits, wanted, atol=LOGITS[torch.float32], rtol=0)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, wanted, atol=LOGITS[torch.float32], rtol=0)
        assert not any("lora_A" in name for name, _ in merged.named_parameters())


def test_adapters_that_cannot_work_are_refused(recursive):
    """A dense model's adapter names maps that are relaxed here; and a name that does not exist."""
    model = RecursiveForCausalLM.from_pretrained(recursive)
    with pytest.raises(ValueError, match=r"RelaxedLinear[\s\S]* is not supported"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    model = RecursiveForCausalLM.from_pretrained(recursive)
    with pytest.raises(ValueError, match=r"No linear map is called 'w1'\. There are: down_proj, gate_proj"):
        model.lora_targets("w1")
    assert "lm_head" not in model.lora_targets()
    assert not any(".views." in name for name in model.lora_targets())


def test_quantized_loading_by_torchao(recursive):
    """Shared weights become int8, residuals stay as they are, and predictions stay near."""
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantized = RecursiveForCausalLM.from_pretrained(recursive, quantization_config=config).eval()
    relaxed = quantized.model.block[0].self_attn.q_proj
    assert "Int8" in type(relaxed.linear.weight).__name__
    assert relaxed.lora_a.dtype == torch.float32
    plain = RecursiveForCausalLM.from_pretrained(recursive).eval()
    ids = random_ids(2, 9)
    with torch.no_grad():
        logits, wanted = quantized(ids).logits, plain(ids).logits
        assert float(torch.nn.functional.cosine_similarity(logits, wanted, dim=-1).min()) > 0.99
        cached = quantized.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=-1)
        uncached = quantized.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=-1, use_cache=False)
    assert torch.equal(cached, uncached)
