"""peft's methods beyond LoRA on a recursive model: each does in ``generate`` what it does in ``forward``."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import DynamicCache

from helpers.tiny_models import random_ids, tiny_dense, tiny_recursive
from helpers.tolerances import LOGITS
from recursify.convert.parity import fold_exactly
from recursify.engine import Engine
from recursify.errors import UnsupportedModelError

TOLERANCE = LOGITS[torch.float32]
IDS = random_ids(2, 7)

VIRTUAL = {
    "prefix tuning": (peft.PrefixTuningConfig, {}),
    "projected prefix": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 16}),
    "prompt tuning": (peft.PromptTuningConfig, {}),
    "p-tuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 16}),
}
"""Methods that put virtual tokens in front of the prompt."""

MAPS = {
    "IA3": (peft.IA3Config, {"feedforward_modules": ["down_proj"], "init_ia3_weights": False}),
    "VeRA": (peft.VeraConfig, {"r": 4, "init_weights": False}),
    "DoRA": (peft.LoraConfig, {"r": 4, "use_dora": True, "init_lora_weights": False}),
    "LoHa": (peft.LoHaConfig, {"r": 4, "init_weights": False}),
    "OFT": (peft.OFTConfig, {"r": 0, "oft_block_size": 8, "init_weights": False}),
    "LoRA and norms": (peft.LoraConfig, {"r": 4, "init_lora_weights": False, "modules_to_save": ["input_layernorm"]}),
    "LoRA and maps": (peft.LoraConfig, {"r": 4, "init_lora_weights": False, "modules_to_save": ["up_proj"]}),
    "LoRA and head": (peft.LoraConfig, {"r": 4, "init_lora_weights": False, "modules_to_save": ["lm_head"]}),
    "LoRA and tokens": (
        peft.LoraConfig,
        {"r": 4, "init_lora_weights": False, "trainable_token_indices": IDS[0].tolist()},
    ),
}
"""Methods that change linear maps, given the names that work, and other modules."""

OTHERS = {
    "LN tuning": (peft.LNTuningConfig, {"target_modules": ["input_layernorm", "norm"]}),
    "trainable tokens": (peft.TrainableTokensConfig, {"token_indices": IDS[0].unique().tolist()}),
    "LoRA of residuals": (
        peft.LoraConfig,
        {"r": 2, "target_parameters": ["down_proj.lora_a"], "init_lora_weights": False},
    ),
}


def adapt(model, method: str):
    """``model`` with a method's parameters, random ones."""
    kind, options = {**VIRTUAL, **MAPS, **OTHERS}[method]
    options = {"task_type": "CAUSAL_LM", **options}
    if method in VIRTUAL:
        options["num_virtual_tokens"] = 5
    if method in MAPS:
        names = ("q_proj", "down_proj")
        options["target_modules"] = model.lora_targets(*names) if hasattr(model, "lora_targets") else list(names)
    if "feedforward_modules" in options:
        options["feedforward_modules"] = model.lora_targets(*options["feedforward_modules"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, kind(**options)).eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    return adapted


@torch.no_grad()
def by_forward(adapted, new: int = 5) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Greedy tokens of ``new`` forwards, each of the whole text, and their logits."""
    ids, logits = IDS, []
    for _ in range(new):
        logits.append(adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1)[:, None]], dim=1)
    return ids, logits


def by_generate(adapted, new: int = 5, **options):
    arguments = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **options}
    return adapted.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **arguments)


@pytest.mark.parametrize("method", [*VIRTUAL, *MAPS, *OTHERS])
def test_generate_does_what_forward_does(method):
    """The method changes the model, every trainable parameter has a gradient, and ``generate`` uses all of it."""
    model = tiny_recursive(varied=True)
    with torch.no_grad():
        bare = model(IDS).logits[:, -1]
    adapted = adapt(model, method)
    ids, logits = by_forward(adapted)
    assert (logits[0] - bare).abs().max() > 0.1
    generated = by_generate(adapted, return_dict_in_generate=True, output_logits=True)
    sequences = generated.sequences
    assert torch.equal(sequences if method not in VIRTUAL else sequences[:, -ids.shape[1] :], ids)
    for found, wanted in zip(generated.logits, logits, strict=True):
        assert (found - wanted).abs().max() < TOLERANCE
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    loss = adapted(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float().square().mean()
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    assert trained
    assert all(gradient is not None for gradient in gradients)


@pytest.mark.parametrize("method", VIRTUAL)
def test_virtual_tokens_do_what_they_do_to_the_dense_model(method):
    """One recursion and the dense model: the same parameters of the method give the same tokens and logits."""
    dense = tiny_dense("llama")
    _, wanted = by_forward(adapt(dense, method))
    recursive = fold_exactly(tiny_dense("llama"), 1)
    found = by_generate(adapt(recursive, method), return_dict_in_generate=True, output_logits=True)
    for ours, theirs in zip(found.logits, wanted, strict=True):
        assert (ours - theirs).abs().max() < TOLERANCE


def test_methods_that_cannot_work_are_refused():
    """By peft, which adapts known attention classes; by generate with fewer layers; by the engine."""
    with pytest.raises(ValueError, match="Unsupported model type for adaption prompt: 'recursive'"):
        peft.get_peft_model(tiny_recursive(), peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2))
    adapted = adapt(tiny_recursive(), "prefix tuning")
    for options in ({"exit_policy": "confidence"}, {"speculate": True}):
        with pytest.raises(ValueError, match="A PeftModelForCausalLM prepares the inputs of generate"):
            by_generate(adapted, **options)
    by_generate(adapted)
    assert by_generate(adapted.base_model, exit_policy="confidence").shape == (2, 12), "without the adapter again"
    with pytest.raises(UnsupportedModelError, match=r"'input_layernorm' of layer 0 .*LNTuningLayer.*merge_and_unload"):
        Engine(adapt(tiny_recursive(), "LN tuning").base_model.model)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_prompt_kept_in_a_cache(name):
    """``generate`` continues it, by either name and with any transformers; another prompt's gives another text."""
    model = tiny_recursive(varied=True)
    with torch.no_grad():
        kept = model(IDS[:, :4], use_cache=True).past_key_values
        other = model(random_ids(2, 4, seed=9), use_cache=True).past_key_values
    wanted = by_generate(model)
    assert torch.equal(by_generate(model, **{name: kept}), wanted)
    assert kept.get_seq_length() == IDS.shape[1] + 5 - 1
    assert not torch.equal(by_generate(model, **{name: other}), wanted)
    for options in ({"exit_policy": "confidence"}, {"speculate": True}):
        with pytest.raises(ValueError, match=f"{name} works neither with an exit policy nor with speculation"):
            by_generate(model, **{name: kept}, **options)


def test_two_caches():
    """The one that holds something is meant; two that do, or do not, are refused."""
    model = tiny_recursive(varied=True)

    def cache(length: int) -> DynamicCache:
        made = DynamicCache(config=model.config)
        if length:
            model(IDS[:, :length], past_key_values=made, use_cache=True)
        return made

    with torch.no_grad():
        wanted = model(IDS).logits[:, 4:]
        for caches in ((cache(4), cache(0)), (cache(0), cache(4))):
            found = model(IDS[:, 4:], past_key_values=caches[0], cache=caches[1]).logits
            assert (found - wanted).abs().max() < TOLERANCE
        for lengths in ((4, 3), (0, 0)):
            match = f"past_key_values with {lengths[0]} tokens and cache with {lengths[1]}"
            with pytest.raises(ValueError, match=match):
                model(IDS[:, 4:], past_key_values=cache(lengths[0]), cache=cache(lengths[1]))
            with pytest.raises(ValueError, match=match):
                by_generate(model, past_key_values=cache(lengths[0]), cache=cache(lengths[1]))
