"""Every causal model type of the installed transformers is converted rightly, or refused by name with the true reason.

A type is refused by its config alone: the folder of these tests has no weights then, so nothing can have been read.
"""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    MiniMaxConfig,
    PreTrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from helpers.small_engine import greedy, prompts, small_engine
from helpers.tiny_models import byte_tokenizer, convert_tiny, random_ids, save_multimodal
from helpers.tolerances import LOGITS
from recursify.checkpoint.dense_families import require_convertible
from recursify.checkpoint.loading import load_model
from recursify.convert.parity import _small_model
from recursify.convert.pipeline import plan_conversion
from recursify.engine import SamplingParams
from recursify.errors import CheckpointError, UnsupportedModelError
from recursify.modeling import CACHE_ARGUMENT, RecursiveConfig

TOLERANCE = LOGITS[torch.float32]

TINY = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
"""Fields of a config with few weights, as far as a type has them."""

LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
"""Fields of latent attention."""

PARTS = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}}
"""Fields of a model that is made of several."""

FIELDS: dict[str, dict] = {
    "cohere_compass_text": {
        "head_dim": 128,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 5e5}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 30,
        }
    },
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text"}},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "minicpm3": LATENT,
    "ministral": {"head_dim": 8},
    "musicgen": {**PARTS, "decoder": {"model_type": "musicgen_decoder"}},
    "musicgen_melody": {**PARTS, "decoder": {"model_type": "musicgen_melody_decoder"}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "ple_layer_ids": [],
        "ple_embed_dim": 16,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True},
    "youtu": LATENT,
}
"""Fields that a type needs beside its defaults and :data:`TINY`: without them transformers cannot build it."""

REASONS = {
    "an encoder or encoder-decoder": "it is an encoder",
    "inside another model": r"it is a language model of family '\w+' inside another model",
    "several models": "it is made of several models",
    "looped already": "it runs its layers several times already",
    "mixtures of experts": r"its layers are mixtures of experts \('",
    "state from token to token": "carries a state from token to token",
    "Conv1D": r"its weights are Conv1D \('",
    "positions without RoPE": r"its positions are (learned|tabulated) \('",
    "shared keys": r"\d+ of its layers read the keys and values of others",
    "another structure": "it is not built as embedding, RoPE, decoder layers, final norm: it has ",
    "inputs of layers": "it feeds its layers from ",
    "weights in layers": "is neither a linear map nor a norm",
    "values in buffers": "keeps values in buffers",
    "embeddings": "it changes the embeddings before its first layer",
    "hidden states": "it changes the hidden states between its last layer and the LM head",
    "fails": "a small one fails as a recursive model",
    "logits": "it changes the logits behind the LM head",
}
"""True reasons by kind."""

KINDS = {
    "right": (
        "arcee bitnet cohere_compass_text cwm ernie4_5 exaone exaone4 gemma gemma2 gemma3_text glm glm4 gpt_neox "
        "helium hunyuan_v1_dense hyperclovax internlm3 iquestcoder jais2 llama ministral ministral3 mistral nemotron "
        "olmo olmo2 olmo3 persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2 vaultgemma youtu"
    ),
    "looped already": "dory hrm_text inkling2_loop_text",
    "mixtures of experts": "afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3 "
    "deepseek_v32 deepseek_v4 dots1 dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite "
    "glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 "
    "inkling2_text inkling_text jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2_moe llama4_text longcat_flash "
    "mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mixtral nemotron_h olmoe phimoe qwen2_moe "
    "qwen3_5_moe_text qwen3_moe qwen3_next sarvam_mla sarvam_moe solar_open zaya",
    "state from token to token": "bamba falcon_h1 falcon_mamba lfm2 lfm3 mamba mamba2 olmo_hybrid qwen3_5_text "
    "recurrent_gemma zamba zamba2",
    "positions without RoPE": "biogpt git gpt_bigcode gpt_neo opt trocr xglm xlm",
    "Conv1D": "gpt2 gpt-sw3 openai-gpt",
    "inside another model": "gemma3 gemma3n gemma4 gemma4_unified llama4 qwen3_5 qwen3_5_moe qwen4_exp fuyu got_ocr2",
    "shared keys": "gemma3n_text",
    "values in buffers": "apertus gemma4_unified_text",
    "another structure": "bloom codegen ctrl falcon gptj modernbert-decoder moshi mpt rwkv xlnet",
    "weights in layers": "diffllama doge gpt_neox_japanese granite_swa",
    "embeddings": "granite nanochat",
    "hidden states": "minicpm3",
    "logits": "cohere cohere2",
}
"""Kinds of reasons that are known by hand; of the other types the reason is any of :data:`REASONS`."""


def known_kinds() -> dict[str, str]:
    """:data:`KINDS` of the installed transformers."""
    if CACHE_ARGUMENT == "cache":
        return KINDS
    # Before 5.24 its RoPE takes position ids of three axes.
    return {**KINDS, "right": KINDS["right"].replace("cohere_compass_text", ""), "fails": "cohere_compass_text"}


def config_of(model_type: str, **fields) -> PreTrainedConfig:
    """Config with the type's own defaults, or with ``fields`` as far as it has them."""
    config_class = CONFIG_MAPPING[model_type]
    known = {*inspect.signature(config_class).parameters, *config_class.attribute_map}
    own = copy.deepcopy(FIELDS.get(model_type, {}))  # some classes change what they are given
    return config_class(**{name: value for name, value in fields.items() if name in known} | own)


def refusal(folder: Path) -> str | None:
    """Message with which a folder without weights is refused; None if weights are what it lacks."""
    with pytest.raises((UnsupportedModelError, CheckpointError)) as error:
        plan_conversion(folder, calibration_data=[])
    if error.type is UnsupportedModelError:
        return str(error.value)
    assert "has no weights" in str(error.value)
    return None


def kind_of(message: str, model_type: str) -> str | None:
    """Kind of the reason in a message; None if there is none."""
    assert message.startswith(f"'{model_type}' cannot be made recursive: ")
    assert "Supported families: llama" in message
    return next((kind for kind, pattern in REASONS.items() if re.search(pattern, message)), None)


def save_dense(model_type: str, folder: Path):
    """Write a tiny random model of the type, its norms and biases random too, and load it by transformers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(model_type, **TINY)).float()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def check_conversion(model_type: str, dense, folder: Path) -> bool:
    """One recursion, and two of full rank, compute what the dense model computes; so does the engine.

    Returns:
        True if it runs in the engine, False if that refuses it by name.
    """
    ids = random_ids(2, 13)
    with torch.inference_mode():
        once = convert_tiny(folder, folder.parent / "once", num_recursions=1, lora_rank=0)
        assert (once(ids).logits - dense(ids).logits).abs().max() < 1e-6
        twice = convert_tiny(folder, folder.parent / "twice", num_recursions=2, sharing="cycle", lora_rank="full")
        assert (twice(ids).logits - dense(ids).logits).abs().max() < TOLERANCE
    wanted = [greedy(dense, prompt, pad_token_id=0) for prompt in prompts(5, 11)]
    assert [greedy(twice, prompt, pad_token_id=0) for prompt in prompts(5, 11)] == wanted
    engines = [build_engine(model, model_type) for model in (twice, dense)]
    for engine in filter(None, engines):
        outputs = engine.generate(prompts(5, 11), SamplingParams(max_tokens=9))
        assert [output.token_ids for output in outputs] == wanted
    return None not in engines


def build_engine(model, model_type: str):
    """An engine for the model; None if it is refused by name."""
    message = ""
    try:
        return small_engine(model)
    except UnsupportedModelError as error:
        message = str(error)
    assert model_type in message
    return None


@pytest.mark.parametrize("model_type", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_right_or_refused(model_type, tmp_path, record_property):
    """Refused before a tensor is read, or converted and run like the dense model."""
    config = config_of(model_type)
    config.save_pretrained(tmp_path / "config")
    message = refusal(tmp_path / "config")
    if message is None:
        dense = save_dense(model_type, tmp_path / "dense")
        try:
            plan_conversion(tmp_path / "dense", calibration_data=[])
        except UnsupportedModelError as error:
            message = str(error)
    if message is None:
        record_property("engine", check_conversion(model_type, dense, tmp_path / "dense"))
    kind = "right" if message is None else kind_of(message, config.model_type)
    record_property("family", kind)
    assert kind is not None, message
    expected = next((kind for kind, types in known_kinds().items() if model_type in types.split()), None)
    assert kind == (expected or kind), message
    assert (kind == "right") == (expected == "right"), f"'{model_type}' is converted: add it to the types that are"


def test_other_types_are_refused(tmp_path):
    """Multimodal, speech, vision and text models outside the causal mapping, by their default configs."""
    others = []
    for model_type in CONFIG_MAPPING:
        if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type == "recursive":
            continue
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:  # needs parts that have no defaults
            continue
        with pytest.raises(UnsupportedModelError, match=f"^'{config.model_type}' cannot be made recursive: it is "):
            require_convertible(config)
        others.append(model_type)
    assert len(others) > 300


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, r"its tokens attend to later ones \(use_bidirec"),
        ("gemma", {"use_bidirectional_attention": True}, r"its tokens attend to later ones"),
        ("gemma4_text", {}, "it feeds its layers from embed_tokens_per_layer"),
        (
            "gemma4_text",  # as the 31B, which has neither per-layer embeddings nor shared keys
            {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
            r"a decoder layer itself \(Gemma4TextDecoderLayer\) keeps values in buffers \(layer_scalar\)",
        ),
        ("llava", {}, "of family 'llama' inside another model .*Save the language model as a folder of its own"),
        ("qwen3_5", {}, r"of family 'qwen3_5_text' inside .* cannot be converted either: .*GatedDeltaNet"),
    ],
)
def test_reason_by_config(model_type, fields, reason):
    """The same type with other fields has another reason."""
    with pytest.raises(UnsupportedModelError, match=rf"'{model_type}' cannot be made recursive: .*{reason}"):
        require_convertible(CONFIG_MAPPING[model_type](**fields))


def test_trial_has_a_layer_of_each_type():
    """Also where the first one of a type comes late."""
    types = ["sliding_attention"] * 5 + ["full_attention"]
    config = config_of("olmo3", **{**TINY, "num_hidden_layers": 6, "layer_types": types})
    assert _small_model(config).config.layer_types == ["sliding_attention"] * 3 + ["full_attention"]


def test_field_of_two_meanings():
    """MiniMax's ``block_size`` is not the size of a shared block; a stray key of a Llama's file is no field."""
    assert RecursiveConfig.clash_with(MiniMaxConfig()) == "block_size"
    assert RecursiveConfig.clash_with(CONFIG_MAPPING["llama"](block_size=4096)) is None


def test_language_model_of_a_multimodal_one(tmp_path):
    """The way that docs/howto/convert.md shows: the same logits, and a family that is converted."""
    save_multimodal(tmp_path / "whole")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", dtype="auto").eval()
    config = whole.config.get_text_config()
    config.tie_word_embeddings = whole.config.tie_word_embeddings
    text = AutoModelForCausalLM.from_config(config, dtype=whole.dtype)
    text.model, text.lm_head = whole.model.language_model, whole.lm_head
    text.save_pretrained(tmp_path / "text")
    ids = random_ids(1, 9)
    once = convert_tiny(tmp_path / "text", tmp_path / "once", num_recursions=1, lora_rank=0)
    with torch.inference_mode():
        assert (once(ids).logits - whole(ids).logits).abs().max() < 1e-6


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("model_type", "runs"),
    [("mixtral", True), ("qwen3_moe", True), ("beam", False), ("falcon_h1", False), ("gpt2", False)],
)
def test_dense_model_in_the_engine(model_type, runs, tmp_path):
    """A dense model of any family is loaded; the engine generates what transformers does, or refuses it by name."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no '{model_type}'")
    AutoModelForCausalLM.from_config(config_of(model_type, **TINY, **EXPERTS)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    dense, _ = load_model(tmp_path)
    engine = build_engine(dense, model_type)
    assert (engine is not None) is runs
    if engine is not None:
        outputs = engine.generate(prompts(5, 11), SamplingParams(max_tokens=9))
        assert [output.token_ids for output in outputs] == [greedy(dense, prompt) for prompt in prompts(5, 11)]
