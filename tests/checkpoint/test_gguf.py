"""A ``.gguf`` is the model that it was made from, or is refused by name."""

from __future__ import annotations

import sys

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.gguf_files import byte_level_keys, llama3_factors, write_gguf
from helpers.tiny_models import SMALL, convert_tiny, random_ids, tiny_dense
from recursify.checkpoint.dense_checkpoint import open_checkpoint
from recursify.checkpoint.gguf.file import GgufFile
from recursify.checkpoint.gguf.rope import fit_llama3
from recursify.convert.pipeline import convert_model, plan_conversion
from recursify.errors import CheckpointError, UnsupportedModelError

VOCABULARY = len(byte_level_keys()["tokenizer.ggml.tokens"])


def rope(kind: str, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
LONGROPE = rope(
    "longrope", long_factor=[1.0, 2.0, 3.0, 5.0], short_factor=[1.0, 1.1, 1.2, 1.4], partial_rotary_factor=1.0,
    original_max_position_embeddings=64,
)  # fmt: skip
CASES = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama, Llama 3": ("llama", LLAMA3),
    "llama, linear": ("llama", rope("linear", factor=4.0)),
    "llama, YaRN": ("llama", YARN),
    "llama, YaRN with all parameters": (
        "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0,
             attention_factor=1.3),
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2, YaRN": ("qwen2", YARN),
    "qwen3, linear": ("qwen3", rope("linear", factor=2.0)),
    "qwen3 with biases": ("qwen3", {"attention_bias": True, "head_dim": 16}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {"layer_types": None}),
    "gemma3, linear": (
        "gemma3_text",
        {
            "layer_types": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ),
    "olmo2, YaRN": ("olmo2", YARN),
    "smollm3": ("smollm3", {"no_rope_layers": None}),
    "phi3": ("phi3", {}),
    "phi3, window": ("phi3", {"sliding_window": 8}),
    "phi3, LongRoPE": ("phi3", {**LONGROPE, "original_max_position_embeddings": 64}),
    "gpt_neox": ("gpt_neox", {}),
}  # fmt: skip


@pytest.fixture
def dense():
    """A tiny Llama with a vocabulary of the tokenizer's size."""
    return tiny_dense("llama", vocab_size=VOCABULARY)


def logits(model, length=96):
    with torch.inference_mode():
        return model(random_ids(2, length)).logits


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_model_it_was_made_from(case, tmp_path):
    """Every family, RoPE scaling and bias; transformers 5.17 and 5.24 read half of these files as another model."""
    family, fields = CASES[case]
    model = tiny_dense(family, vocab_size=VOCABULARY, **fields)
    read = open_checkpoint(write_gguf(tmp_path / "model.gguf", model)).load_model()
    assert read.config.model_type == ("llama" if family == "mistral" else family)
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-5, atol=1e-5)


def test_family_that_we_do_not_test(tmp_path):
    """StarCoder 2: LayerNorms, and biases everywhere."""
    fields = {name: value for name, value in SMALL.items() if name != "head_dim"} | {"vocab_size": VOCABULARY}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("starcoder2", **fields, **YARN)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    read = open_checkpoint(write_gguf(tmp_path / "model.gguf", model)).load_model()
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-5, atol=1e-5)


def test_scaling_is_in_the_config_as_its_maker_wrote_it(tmp_path):
    """The parameters of Llama 3 are found from the divisors that the file stores; decimals stay decimals."""
    model = tiny_dense("llama", vocab_size=VOCABULARY, rms_norm_eps=1e-5, **LLAMA3)
    config = open_checkpoint(write_gguf(tmp_path / "model.gguf", model)).config
    assert config.rope_parameters == LLAMA3["rope_parameters"]
    assert config.rms_norm_eps == 1e-5


@pytest.mark.parametrize(
    ("head_dim", "theta", "factor", "low", "high", "original"),
    [
        (128, 500000.0, 8.0, 1.0, 4.0, 8192),  # Llama 3.1
        (64, 500000.0, 32.0, 1.0, 4.0, 8192),  # Llama 3.2
        (128, 10000.0, 4.0, 1.0, 16.0, 2048),
        (128, 500000.0, 16.0, 1.0, 4.0, 4000),
        (8, 10000.0, 8.0, 1.0, 4.0, 64),  # one frequency between
        (8, 10000.0, 8.0, 1.0, 1.5, 200),  # none between
    ],
)
def test_divisors_determine_the_scaling(head_dim, theta, factor, low, high, original):
    """All frequencies are those of the scaling that made the divisors."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    made = {
        "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }  # fmt: skip
    found = fit_llama3(llama3_factors(head_dim, made), theta, head_dim, "model.gguf")
    frequencies = [
        ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=head_dim, rope_parameters=parameters), "cpu")[0]
        for parameters in (made, {"rope_theta": theta, **found})
    ]
    torch.testing.assert_close(frequencies[1], frequencies[0], rtol=1e-5, atol=0)


def test_divisors_of_no_known_scaling(dense, tmp_path):
    """Refused, not ignored."""
    file = write_gguf(tmp_path / "m.gguf", dense, tensors={"rope_freqs.weight": torch.tensor([1.0, 3.0, 2.0, 5.0])})
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs.weight of 4 values that are not those of Llama 3"):
        open_checkpoint(file)


def test_missing_biases_of_a_set_are_zeros(tmp_path):
    """llama.cpp takes biases one by one; transformers has those of attention all or none."""
    model = tiny_dense("llama", vocab_size=VOCABULARY, attention_bias=True)
    outputs = [layer.self_attn.o_proj.bias for layer in model.model.layers]
    for bias in outputs:
        bias.data.zero_()
    names = [f"blk.{layer}.attn_output.bias" for layer in range(len(outputs))]
    read = open_checkpoint(write_gguf(tmp_path / "model.gguf", model, without=names)).load_model()
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-5, atol=1e-5)


def test_fused_query_key_value(dense, tmp_path):
    """One tensor for three maps, which llama.cpp's converter can write for every family."""
    separate = GgufFile(write_gguf(tmp_path / "separate.gguf", dense))
    fused, names = {}, []
    for layer in range(dense.config.num_hidden_layers):
        parts = [f"blk.{layer}.attn_{part}.weight" for part in "qkv"]
        fused[f"blk.{layer}.attn_qkv.weight"] = torch.cat([separate.read(part) for part in parts])
        names += parts
    file = write_gguf(tmp_path / "fused.gguf", dense, tensors=fused, without=names)
    torch.testing.assert_close(logits(open_checkpoint(file).load_model()), logits(dense))


def test_quantized_tensors(tmp_path):
    """Values of the dequantized blocks, in transformers' layout; norms stay float32."""
    model = tiny_dense("qwen2", vocab_size=VOCABULARY, intermediate_size=64)
    read = open_checkpoint(write_gguf(tmp_path / "model.gguf", model, quantization="Q8_0")).load_model()
    for name, parameter in model.named_parameters():
        bound = parameter.abs().amax().item() / 127 if parameter.ndim == 2 else 0.0  # half a step, and its 16 bits
        assert (read.get_parameter(name) - parameter).abs().max() <= bound
    assert not torch.equal(read.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.logit_scale", 0.5),
        ("llama.attention.sliding_window", 16),
        ("llama.rope.scaling.alpha", 2.0),
        ("llama.expert_count", 8),
        ("llama.attention.causal", False),
        ("llama.rope.scaling.attn_factor", 1.5),
        ("llama.rope.dimension_count", 4),
        ("llama.attention.value_length", 16),
        ("llama.some_day", "new"),
    ],
)
def test_key_of_another_model(dense, tmp_path, key, value):
    """Refused by name, before anything is written."""
    file = write_gguf(tmp_path / "model.gguf", dense, keys={key: value})
    name = "head" if key == "llama.attention.value_length" else key.removeprefix("llama.")
    with pytest.raises(UnsupportedModelError, match=name.replace("head", "values of 16 dimensions")):
        convert_model(file, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["llama.expert_count", "llama.pooling_type", "llama.nextn_predict_layers"])
def test_key_with_the_value_that_changes_nothing(dense, tmp_path, key):
    """Accepted."""
    file = write_gguf(tmp_path / "model.gguf", dense, keys={key: 0, "llama.tensor_data_layout": "x"})
    assert torch.equal(open_checkpoint(file).load_model()(random_ids(1, 8)).logits, dense(random_ids(1, 8)).logits)


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "blk.5.ffn_gate_exps.weight", "cls.output.weight"])
def test_tensor_of_another_model(dense, tmp_path, name):
    """Refused by name."""
    file = write_gguf(tmp_path / "model.gguf", dense, tensors={name: torch.ones(32)})
    with pytest.raises(UnsupportedModelError, match=rf"tensors that llama does not have in transformers: {name}"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (
            {"llama.attention.head_count_kv": [2, 2, 2, 2, 2, 4]},
            r"layers of different shapes \('llama.attention.head_c",
        ),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5}, r"yarn_ext_factor 0.5"),
        ({"llama.rope.scaling.type": "longrope"}, "scaling.type 'longrope' without the tensors"),
        ({"llama.rope.scaling.type": "ntk"}, "rope.scaling.type 'ntk', which is not known"),
        ({"general.type": "adapter"}, "general.type 'adapter', so it is not a model"),
    ],
)
def test_what_the_family_does_not_have(dense, tmp_path, keys, match):
    """Named with its value."""
    with pytest.raises(UnsupportedModelError, match=match):
        open_checkpoint(write_gguf(tmp_path / "model.gguf", dense, keys=keys))


def test_unknown_architecture(dense, tmp_path):
    """The known ones are listed."""
    with pytest.raises(UnsupportedModelError, match=r"architecture 'mamba'\. Those that are read .*llama, qwen2"):
        open_checkpoint(write_gguf(tmp_path / "model.gguf", dense, keys={"general.architecture": "mamba"}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"without": ["blk.3.ffn_up.weight"]}, r"lacks the tensor 'blk.3.ffn_up.weight' of a llama model with 6"),
        ({"without": ["llama.context_length"]}, r"lacks the key 'llama.context_length'"),
        ({"without": ["token_embd.weight"]}, r"lacks the tensor 'token_embd.weight'"),
        ({"keys": {"llama.vocab_size": 99}}, rf"a vocabulary of 99, but its embedding has {VOCABULARY} rows"),
        ({"keys": {"llama.feed_forward_length": 64}}, r"has shape \[48, 32\], but its keys require \[64, 32\]"),
        ({"keys": {"split.count": 3}}, r"one of 3 parts of a model\. Join them first: llama-gguf-split --merge"),
        ({"tensors": {"blk.1.ffn_up.weight": torch.full((48, 32), float("nan"))}}, r"up_proj.weight' in .* has 1536"),
    ],
)
def test_damaged_file(dense, tmp_path, changes, match):
    """One clear error, and nothing written."""
    file = write_gguf(tmp_path / "model.gguf", dense, **changes)
    with pytest.raises(CheckpointError, match=match):
        convert_model(file, tmp_path / "out", check=False, calibration_data=[])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", [0.0, 0.0001, 0.01, 0.02, 0.05, 0.07, 0.5, 0.999])
def test_truncated_file(dense, tmp_path, part):
    """Named when it is opened, wherever it ends, with what to do."""
    file = write_gguf(tmp_path / "model.gguf", dense)
    content = file.read_bytes()
    file.write_bytes(content[: int(part * len(content))])
    match = r"(cannot be read as a GGUF language model|does not have all of the tensor).*truncated or damaged"
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(file)


def test_quantization_that_is_not_read(dense, tmp_path):
    """Named when it is opened, with the first tensor that has it."""
    file = write_gguf(tmp_path / "model.gguf", dense)
    content = file.read_bytes()
    for kind, reason in ((gguf.GGMLQuantizationType.Q8_K, "Q8_K"), (999, "999 is not a valid")):
        name = b"blk.2.attn_q.weight"
        place = content.index(name) + len(name) + 4 + 2 * 8
        file.write_bytes(content[:place] + int(kind).to_bytes(4, "little") + content[place + 4 :])
        match = rf"'blk.2.attn_q.weight' in .* does not dequantize: .*{reason}.* in another quantization"
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(file)


def test_without_the_gguf_package(dense, tmp_path, monkeypatch):
    """The package that is missing is named, and the command that installs it."""
    file = write_gguf(tmp_path / "model.gguf", dense)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        CheckpointError, match=r"without the Python package 'gguf'.*Run: pip install 'recursify\[gguf\]'$"
    ):
        open_checkpoint(file)


def test_package_that_is_too_old(dense, tmp_path, monkeypatch):
    """An architecture that came later than the installed ``gguf``."""
    file = write_gguf(tmp_path / "model.gguf", dense)
    names = {number: name for number, name in gguf.MODEL_ARCH_NAMES.items() if name != "llama"}
    monkeypatch.setattr("gguf.MODEL_ARCH_NAMES", names)
    with pytest.raises(CheckpointError, match=r"'llama', which the installed .* gguf does not know.*--upgrade gguf"):
        open_checkpoint(file)


def test_streamed_model(dense, tmp_path, monkeypatch):
    """The logits of the loaded one; its layers are read when they run, and only one of them is in memory."""
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", dense))
    expected = logits(checkpoint.load_model())
    model, layers_in_memory = checkpoint.stream_model(), []
    for layer in model.model.layers:
        inside = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
        inside.register_forward_hook(
            lambda *_: layers_in_memory.append(sum(not p.is_meta for p in model.model.layers.parameters()))
        )
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    for _ in range(2):
        assert torch.equal(logits(model), expected)
        assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    per_layer = sum(1 for _ in model.model.layers[0].parameters())
    assert layers_in_memory == [per_layer] * 2 * len(model.model.layers)


def test_plan_reads_headers_only(dense, tmp_path, monkeypatch):
    """``convert x.gguf --dry-run`` dequantizes nothing."""
    file = write_gguf(tmp_path / "model.gguf", dense)
    monkeypatch.setattr(GgufFile, "read", lambda self, name: pytest.fail(f"{name} was read"))
    assert plan_conversion(file).warnings == plan_conversion(file, calibration_data=[]).warnings


def test_converted_model_has_the_logits_of_the_file(tmp_path):
    """One recursion without residuals is the dense model: biases, scaling and all."""
    model = tiny_dense("llama", vocab_size=VOCABULARY, attention_bias=True, **LLAMA3)
    file = write_gguf(tmp_path / "model.gguf", model)
    recursive = convert_tiny(file, tmp_path / "out", num_recursions=1)
    torch.testing.assert_close(logits(recursive), logits(model), rtol=1e-5, atol=1e-5)
