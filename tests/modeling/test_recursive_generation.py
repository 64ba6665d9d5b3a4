"""Arguments of ``generate``, and how the dense family prepares its inputs."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from helpers.rope_types import LIMIT, MODELS, ROPE_TYPES, with_rope
from helpers.small_engine import recursive, small_engine
from helpers.tiny_models import byte_tokenizer, random_ids, tiny_dense, tiny_recursive
from helpers.tolerances import LOGITS
from recursify.convert.parity import fold_exactly
from recursify.engine import SamplingParams
from recursify.modeling import ExitSettings, RecursiveForCausalLM, make_policy
from recursify.modeling.recursive_columns import window_of


@pytest.mark.parametrize("given", ["argument", "generation config"])
@pytest.mark.parametrize("way", [{"exit_policy": ExitSettings(make_policy("confidence", 1.0))}, {"speculate": True}])
def test_stop_strings_end_a_text_at_any_depth(way, given):
    """Where they end it in a plain ``generate``."""
    model, tokenizer = tiny_recursive(recursions=2, varied=True), byte_tokenizer()
    ids = random_ids(2, 6, seed=1)[:1]
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    free = model.generate(ids, **arguments)
    stop = tokenizer.decode(free[0, 7:9])  # two tokens of ASCII
    config = GenerationConfig(stop_strings=[stop], **arguments)
    arguments = {"generation_config": config} if given == "generation config" else {**arguments, "stop_strings": [stop]}
    wanted = model.generate(ids, tokenizer=tokenizer, **arguments)
    assert not torch.equal(wanted, free)
    found = model.generate(ids, tokenizer=tokenizer, **arguments, **way)
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(ids, **arguments, **way)


def test_every_type_of_rope_is_known():
    """A type that transformers adds has to be looked at."""
    assert set(ROPE_TYPES) == set(ROPE_INIT_FUNCTIONS)


@pytest.mark.parametrize(("family", "name"), MODELS)
def test_generate_rotates_as_the_dense_model(family, name):
    """One recursion and the dense model, fresh each: short, past the limit, across it, and rows of unlike lengths."""

    def run(make, ids, **options):
        arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
        return make(tiny_dense(family, **with_rope(family, name))).generate(ids, **arguments)

    padded = random_ids(2, 20)
    padded[0, :9] = 0
    for ids in (random_ids(1, 6), random_ids(1, LIMIT + 5), random_ids(1, LIMIT - 5), padded):
        options = {"attention_mask": (ids != 0).long(), "return_dict_in_generate": True, "output_logits": True}
        # Phi-3 starts again, so uncached is the same; with transformers before 5.24 its dense model forgets the text.
        wanted = run(lambda dense: dense, ids, use_cache=family != "phi3", **options)
        found = run(lambda dense: fold_exactly(dense, 1), ids, **options)
        assert torch.equal(found.sequences, wanted.sequences)
        for ours, theirs in zip(found.logits, wanted.logits, strict=True):
            assert (ours - theirs).abs().max() < LOGITS[torch.float32]


@pytest.mark.parametrize("way", [{"exit_policy": ExitSettings(make_policy("confidence", 1.0))}, {"speculate": True}])
@pytest.mark.parametrize(("family", "name"), [("llama", "dynamic"), ("llama", "longrope"), ("phi3", "longrope")])
def test_exits_rotate_by_the_length_or_refuse_it(family, name, way):
    """As ``generate`` does on one side of the limit; a text that crosses it is refused by name."""
    model = recursive(family, dense=with_rope(family, name))
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    lengths = [LIMIT - 7] if name == "dynamic" else [LIMIT - 7, LIMIT + 1]
    for length in lengths:
        ids = random_ids(1, length)
        model(random_ids(1, 2 * LIMIT))  # leaves other frequencies behind
        wanted = copy.deepcopy(model).generate(ids, **arguments)
        assert torch.equal(model.generate(ids, **arguments, **way), wanted)
    match = rf"RoPE \({name}\) has other frequencies beyond {LIMIT} tokens, and a text that grows from 20 to 27 tokens"
    with pytest.raises(ValueError, match=match):
        model.generate(random_ids(1, 20), **arguments, **way)


@pytest.mark.parametrize("field", ["sliding_window", "attention_chunk_size"])
@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt_neox"])
def test_limits_of_attention_that_the_family_ignores(family, field, tmp_path):
    """A stray field of config.json: full attention, as in the dense model's forward (its cache applies the field)."""
    dense = tiny_dense(family, **{field: 8})
    ids = random_ids(1, 30)
    with torch.no_grad():
        wanted = dense(ids).logits
    model = fold_exactly(dense, 1)
    model.save_pretrained(tmp_path)
    arguments = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    text = dense.generate(ids, use_cache=False, **arguments)
    for each in (model, RecursiveForCausalLM.from_pretrained(tmp_path).eval()):
        with torch.no_grad():
            assert torch.equal(each(ids).logits, wanted)
        assert torch.equal(each.generate(ids, **arguments), text)
    for each in (model, dense):
        (output,) = small_engine(each).generate([ids[0].tolist()], SamplingParams(max_tokens=10))
        assert output.token_ids == text[0, 30:].tolist()


def test_attention_of_another_type_is_refused():
    """Decoding by columns and pages knows full attention and windows."""
    config = SimpleNamespace(sliding_window=8, layer_types=["sliding_attention", "full_attention", "chunked_attention"])
    assert [window_of(config, position) for position in (0, 1)] == [8, None]
    with pytest.raises(ValueError, match="Layer 2 has 'chunked_attention', and only full and sliding attention"):
        window_of(config, 2)
