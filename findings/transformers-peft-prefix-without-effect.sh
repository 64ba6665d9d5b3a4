#!/usr/bin/env bash
# peft on transformers: a prefix-tuned model generates what the untuned one generates.
#
# Expected: generate of a prefix-tuned model equals choosing the best token of its forward again and again.
# Found: forward has the prefix, generate does not. peft hands its prefix over as past_key_values; generate of
#        transformers 5.24 adds a new, empty cache under the name cache, and the model takes that one. No error, and no
#        word beyond a deprecation warning: an evaluation by generate measures the untuned model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$venv/bin/pip" install --quiet torch==2.13.0
"$venv/bin/pip" install --quiet transformers==5.24.0 peft==0.21.2
cd "$folder"
"$venv/bin/python" -W ignore - <<'PYTHON'
import sys

import peft
import torch
import transformers
from peft import PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
NEW = 8

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
dense = LlamaForCausalLM(LlamaConfig(vocab_size=64, eos_token_id=None, initializer_range=0.5, **sizes)).eval()
ids = torch.randint(3, 64, (1, 10))
how = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
untuned = dense.generate(ids, **how)[0, ids.shape[1] :].tolist()

tuned = get_peft_model(dense, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
torch.nn.init.normal_(tuned.prompt_encoder["default"].embedding.weight, std=3.0)  # as if it had been trained
with torch.no_grad():
    tokens = ids
    for _ in range(NEW):
        tokens = torch.cat([tokens, tuned(tokens).logits[:, -1:].argmax(-1)], dim=1)
    by_forward = tokens[0, ids.shape[1] :].tolist()
    by_generate = tuned.generate(input_ids=ids, **how)[0, ids.shape[1] :].tolist()
print(f"untuned, generate: {untuned}")
print(f"tuned, forward:    {by_forward}")
print(f"tuned, generate:   {by_generate}")
unchanged = by_generate == untuned != by_forward
print("as described" if unchanged else "CHANGED: the behavior is another one now")
sys.exit(not unchanged)
PYTHON
