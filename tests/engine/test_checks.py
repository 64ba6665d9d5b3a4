"""Checks before an engine runs, and before it accepts a request."""

import pytest

from helpers.schedules import model_of
from helpers.small_engine import prompts, recursive, small_engine
from helpers.tiny_models import byte_tokenizer, tiny_dense
from recursify.engine import Engine, SamplingParams
from recursify.errors import EngineError, UnsupportedModelError
from recursify.experiments.adaptive_thresholds import AdaptiveThresholds
from recursify.modeling import ExitSettings, make_policy


def test_layers_that_differ_are_refused_by_name():
    """A layer that is not the same at all depths cannot be one call."""
    model = recursive()
    model.model.block[0].views[1].self_attn.scaling = 0.5
    with pytest.raises(UnsupportedModelError, match=r"layer 0 of the shared block.*'self_attn.scaling' is .* and 0.5"):
        Engine(model)


def test_a_length_beyond_the_context_is_reported(caplog):
    """The engine takes the context instead."""
    model = recursive()
    model.config.max_position_embeddings = 16
    assert Engine(model, max_model_len=64).max_model_len == 16
    assert "Requests can have 16 tokens, the model's context, and not 64." in caplog.text


def test_models_that_do_more_are_refused():
    """What a model does outside its layers is found when logits are compared."""
    model = tiny_dense("llama")
    model.model.register_forward_hook(
        lambda module, inputs, output: setattr(output, "last_hidden_state", 2 * output[0]) or output
    )
    with pytest.raises(UnsupportedModelError, match="does not reproduce this llama model"):
        Engine(model)


def test_models_that_cannot_run_are_refused():
    """Mixed loops, and a model set to one exit."""
    model = recursive(lora_rank=0, tie_norms=True)
    with pytest.raises(UnsupportedModelError, match=r"mixes loops \(anderson=1\)"):
        Engine(model.with_recursions(4, anderson=1))
    model = recursive()
    model.config.exit_depth = 0
    with pytest.raises(UnsupportedModelError, match="exit after depth 0 always"):
        Engine(model)


def test_requests_that_cannot_be_answered():
    """An error at once, and never a request that hangs."""
    engine = Engine(recursive(), byte_tokenizer(), page_size=4, num_pages=6, max_model_len=64)
    with pytest.raises(EngineError, match="40 tokens and max_tokens is 30: together more than the 64"):
        engine.add(prompts(40)[0], SamplingParams(max_tokens=30))
    with pytest.raises(EngineError, match=r"needs 8 pages for 30 tokens, and the engine has 6"):
        engine.add(prompts(20)[0], SamplingParams(max_tokens=10))
    with pytest.raises(EngineError, match="no tokens"):
        engine.add([])
    with pytest.raises(EngineError, match="Token 1000 is not in the model's vocabulary of 260 entries"):
        engine.add([1, 1000])
    with pytest.raises(EngineError, match="is text or a list of token ids: invalid literal"):
        engine.add(["a"])
    with pytest.raises(EngineError, match="needs exit heads, and the model has none"):
        engine.add([1], SamplingParams(exit="head"))
    with pytest.raises(EngineError, match="'oracle' is a simulation"):
        engine.add([1], SamplingParams(exit="oracle"))
    with pytest.raises(EngineError, match="Unknown exit policy 'sometimes'"):
        engine.add([1], SamplingParams(exit="sometimes"))
    with pytest.raises(EngineError, match="exit settings have kv 'copied', and the engine 'deferred'"):
        engine.add([1], SamplingParams(exit=ExitSettings(make_policy("confidence"), kv="copied")))
    learned = ExitSettings(make_policy("confidence"), adapt=AdaptiveThresholds(0.9))
    with pytest.raises(EngineError, match=r"exits after recursions only.*Leave layers and adapt out"):
        engine.add([1], SamplingParams(exit=learned))
    with pytest.raises(EngineError, match="There is no exit after depth 3"):
        engine.add([1], SamplingParams(exit=ExitSettings(make_policy("fixed", 3))))
    with pytest.raises(EngineError, match="2 prompts and 1 params"):
        engine.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(EngineError, match="no tokens"):
        engine.generate([[1], []], SamplingParams(max_tokens=4))
    assert not engine.has_work, "the first of the two was taken back"


def test_requests_without_a_tokenizer():
    engine = small_engine(recursive())
    with pytest.raises(EngineError, match="text prompt needs a tokenizer"):
        engine.add("Once")
    with pytest.raises(EngineError, match="Stop strings need a tokenizer"):
        engine.add([1], SamplingParams(stop=("x",)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be a whole number of at least 1, got 0"),
        ({"kv_cache_memory_bytes": 100}, "100 bytes of KV cache are too few: one page of 16 tokens takes"),
        ({"kv": "best"}, "Unknown kv 'best'. Use one of: deferred"),
        ({"kv": "copied"}, "was trained with 'deferred' keys and values; with 'copied' early exits change its output"),
        ({"kv": "shared", "force_kv": True}, "does not support kv 'shared', only its own 'deferred'"),
    ],
)
def test_engines_that_cannot_be(arguments, message):
    with pytest.raises(EngineError, match=message):
        Engine(recursive(), **arguments)


def test_modes_of_routed_models():
    """Routers say how far a token goes, and with which keys."""
    model = model_of("llama", "recursion_wise")
    with pytest.raises(EngineError, match="does not support kv 'shared', only its own 'recursion_wise'"):
        Engine(model, kv="shared", force_kv=True)
    engine = small_engine(model)
    with pytest.raises(EngineError, match="has routers, which decide how far a token goes"):
        engine.add([1], SamplingParams(max_depth=0))
    with pytest.raises(EngineError, match="has no exits"):
        small_engine(tiny_dense("llama")).add([1], SamplingParams(exit="confidence"))
