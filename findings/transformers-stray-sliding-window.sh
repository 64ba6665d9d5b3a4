#!/usr/bin/env bash
# transformers: a field of another family in config.json changes what generate writes, and not what forward computes.
#
# Expected: sliding_window means nothing to Llama, whose attention has no window. Models that were rewritten as Llama from
#           a family with windows (Mistral, Qwen) carry the field along.
# Found: forward ignores it, and so does generate without a cache. The cache that generate makes is built from the field
#        and drops keys outside the window: with texts longer than it, generate writes other tokens. No message.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$venv/bin/pip" install --quiet torch==2.13.0
"$venv/bin/pip" install --quiet transformers==5.24.0
cd "$folder"
"$venv/bin/python" -W ignore - <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

print(f"torch {torch.__version__}, transformers {transformers.__version__}")

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=64, eos_token_id=None, initializer_range=0.5, **sizes)
model = LlamaForCausalLM(config).eval()
model.save_pretrained("model")
fields = json.loads(Path("model/config.json").read_text())
Path("model/config.json").write_text(json.dumps({**fields, "sliding_window": 8}))
stray = LlamaForCausalLM.from_pretrained("model").eval()
ids = torch.randint(3, 64, (1, 30))
how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def written(model, **more):
    return model.generate(ids, **how, **more)[0, ids.shape[1] :].tolist()


with torch.no_grad():
    same_logits = torch.equal(model(ids, use_cache=False).logits, stray(ids, use_cache=False).logits)
print(f"forward, with the field as without:  {same_logits}")
print(f"generate without the field:          {written(model)}")
print(f"generate with it, use_cache=False:   {written(stray, use_cache=False)}")
print(f"generate with it:                    {written(stray)}")
unchanged = same_logits and written(stray, use_cache=False) == written(model) != written(stray)
print("as described" if unchanged else "CHANGED: the behavior is another one now")
sys.exit(not unchanged)
PYTHON
