#!/usr/bin/env bash
# peft: merge_and_unload() after LoraConfig(layer_replication=...) changes the predictions, without a warning.
#
# Expected: merging adapters into the weights leaves the logits as they were, or raises.
# Cause: copies of a layer share their base weight, so each gets the adapters of all copies added.
# Found: logits of the merged model are wrong by more than half of the largest logit. Before merging, and
#        for a model without replication, everything is right.
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
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
CONFIG = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
              num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)


@torch.no_grad()
def difference_by_merging(layer_replication):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**CONFIG))
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"],
                      layer_replication=layer_replication)
    model = get_peft_model(base, lora).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as after training: every copy of a layer has an adapter of its own
            parameter.normal_(0, 0.2)
    ids = torch.randint(0, 64, (2, 16))
    before = model(ids).logits
    merged = model.merge_and_unload()
    after = merged(ids).logits
    layers = merged.model.layers
    is_shared = len(layers) > 4 and layers[4].self_attn.q_proj.weight.data_ptr() == layers[2].self_attn.q_proj.weight.data_ptr()
    relative = float((after - before).abs().max() / before.abs().max())
    print(f"layer_replication={layer_replication}: {len(layers)} layers, layer 4 shares weights with layer 2: {is_shared}, "
          f"largest change by merging {relative:.2g} of the largest logit")
    return relative


plain = difference_by_merging(None)
replicated = difference_by_merging([[0, 4], [2, 4]])
print("expected: no change beyond rounding, or an exception")
if plain > 1e-4 or replicated < 0.1:
    sys.exit("the behavior has changed")
print("found: with replicated layers, the merged model predicts something else")
PYTHON
