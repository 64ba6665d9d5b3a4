#!/usr/bin/env bash
# transformers: from_pretrained(gguf_file=...) drops RoPE scaling and the biases of llama.
#
# Expected: a .gguf that says "linear scaling by 4", "YaRN by 4" or "Llama 3's scaling", or that has biases, loads as that
#           model, or fails. llama.cpp (llama-cpp-python 0.3.36) has the log-probabilities of the original to 1e-6 on such
#           files, made by its own converter.
# Found: the keys rope.scaling.*, the tensor rope_freqs.weight and the tensors attn_*.bias and ffn_*.bias are ignored, at
#        logging level INFO for the keys and without a word for the tensors. config.rope_parameters is the default,
#        attention_bias and mlp_bias are False, and the model is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$venv/bin/pip" install --quiet torch==2.13.0
"$venv/bin/pip" install --quiet transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
cd "$folder"
"$venv/bin/python" -W ignore - <<'PYTHON'
import sys

import gguf
import torch
import transformers
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

print(f"torch {torch.__version__}, transformers {transformers.__version__}, gguf 0.19.0")
LAYERS, HEADS, HEAD_DIM, VOCABULARY = 2, 4, 8, 64


def write(model, path):
    """The keys and tensors that llama.cpp's convert_hf_to_gguf.py writes for this model."""
    config, rope = model.config, model.config.rope_parameters
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(VOCABULARY)
    writer.add_name("tiny")
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":  # the divisor of every frequency
        plain = 1 / rope["rope_theta"] ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        writer.add_tensor("rope_freqs.weight", (plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]).numpy())
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if ".q_proj." in name or ".k_proj." in name:  # rows in the order of interleaved RoPE
            tensor = tensor.unflatten(0, (HEADS, 2, HEAD_DIM // 2)).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{names.get_name(module)}.{kind}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope(kind, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


CASES = {
    "plain": {},
    "linear": rope("linear", factor=4.0),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=64),
    "llama3": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    "biases": {"attention_bias": True, "mlp_bias": True},
}
differs = {}
for case, fields in CASES.items():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HEADS * HEAD_DIM, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=256, initializer_range=0.2, **fields,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    write(model, f"{case}.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{case}.gguf", dtype=torch.float32).eval()
    ids = torch.randint(VOCABULARY, (1, 200))
    with torch.inference_mode():
        difference = (model(ids).logits.log_softmax(-1) - loaded(ids).logits.log_softmax(-1)).abs().max().item()
    differs[case] = difference > 1e-3
    print(f"{case}: log-probabilities differ by {difference:.2g}; loaded with rope_type "
          f"{loaded.config.rope_parameters['rope_type']!r}, attention_bias {loaded.config.attention_bias}")
print("expected: no difference, or an exception from from_pretrained()")
if differs != {"plain": False, "linear": True, "yarn": True, "llama3": True, "biases": True}:
    sys.exit("the behavior has changed")
print("found: a valid .gguf with RoPE scaling or biases is loaded as another model")
PYTHON
