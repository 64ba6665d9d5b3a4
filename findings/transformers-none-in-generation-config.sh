#!/usr/bin/env bash
# transformers: None in a GenerationConfig that is passed to generate is replaced by the model's own value.
#
# Expected: generate(ids, generation_config=GenerationConfig(eos_token_id=None, max_new_tokens=N)) generates N tokens, as
#           generate(ids, eos_token_id=None, max_new_tokens=N) does.
# Found: the keyword switches EOS off, the same value in the config does not: fields that are None are filled from
#        model.generation_config, so the text ends at the model's EOS. Rows of a benchmark that asks for N tokens end
#        earlier than its author believes.
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
import sys

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
WANTED = 12

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=64, eos_token_id=None, initializer_range=0.5, **sizes)
model = LlamaForCausalLM(config).eval()
ids = torch.tensor([[1, 5, 9]])
without_end = {"do_sample": False, "max_new_tokens": WANTED, "eos_token_id": None, "pad_token_id": 0}

free = model.generate(ids, **without_end)[0, ids.shape[1] :].tolist()
model.generation_config.eos_token_id = free[4]  # as a generation_config.json would have it

by_keyword = model.generate(ids, **without_end)[0, ids.shape[1] :].tolist()
by_config = model.generate(ids, generation_config=GenerationConfig(**without_end))[0, ids.shape[1] :].tolist()
print(f"asked for:               {WANTED} tokens, eos_token_id=None")
print(f"None as a keyword:       {len(by_keyword)} tokens")
print(f"None in the config:      {len(by_config)} tokens")
unchanged = by_keyword == free and len(by_config) < WANTED and by_config == free[: len(by_config)]
print("as described" if unchanged else "CHANGED: the behavior is another one now")
sys.exit(not unchanged)
PYTHON
