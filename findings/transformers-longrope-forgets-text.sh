#!/usr/bin/env bash
# transformers 5.17: Phi-3 with LongRoPE forgets its text where it crosses original_max_position_embeddings.
#
# Expected: generate with a KV cache equals generate without one, as everywhere else: where the text grows beyond the
#           limit, other RoPE factors begin, so keys and values are computed again.
# Found: the cache is dropped there, and the model is given the last token alone: every token after the limit is generated
#        without the text. No message. transformers 5.24 passes the whole text.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$venv/bin/pip" install --quiet torch==2.13.0
"$venv/bin/pip" install --quiet transformers==5.17.0
cd "$folder"
"$venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
import transformers
from transformers import Phi3Config, Phi3ForCausalLM

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
LIMIT, NEW = 24, 12

torch.manual_seed(0)
rope = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": LIMIT,
}
config = Phi3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=96,
    original_max_position_embeddings=LIMIT,
    initializer_range=0.5,
    rope_parameters=rope,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
model = Phi3ForCausalLM(config).eval()
ids = torch.randint(3, 64, (1, LIMIT - 4))
given = []


def record(module, arguments, kwargs):
    cache = kwargs.get("past_key_values")
    given.append((kwargs["input_ids"].shape[1], 0 if cache is None else cache.get_seq_length()))


model.model.register_forward_pre_hook(record, with_kwargs=True)


def written(**more):
    given.clear()
    tokens = model.generate(ids, max_new_tokens=NEW, do_sample=False, **more)[0, ids.shape[1] :].tolist()
    return tokens, list(given)


without, _ = written(use_cache=False)
with_cache, steps = written()
print(f"without a cache: {without}")
print(f"with a cache:    {with_cache}")
print(f"tokens given to the model, and tokens in its cache, by step: {steps}")
before = LIMIT - ids.shape[1]
unchanged = with_cache[:before] == without[:before] and with_cache != without and (1, 0) in steps
print("as described" if unchanged else "CHANGED: the behavior is another one now")
sys.exit(not unchanged)
PYTHON
