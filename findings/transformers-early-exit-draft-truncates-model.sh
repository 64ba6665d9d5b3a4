#!/usr/bin/env bash
# transformers: an exception during generate(assistant_early_exit=N) leaves the model with N layers.
#
# Expected: a call of generate() that ends with an exception (a stop by the user, no memory, a timeout in a callback)
#           leaves the model as it was.
# Cause: the draft sets config.num_hidden_layers = N and restores it only if nothing is raised.
# Found: if the exception comes while a draft is generated, from then on every forward pass runs N layers, without a
#        warning, and save_pretrained() writes the wrong number of layers into config.json.
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

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

transformers.logging.set_verbosity_error()
print(f"torch {torch.__version__}, transformers {transformers.__version__}")


class StopOnce(LogitsProcessor):
    """The first token of the first draft: as Ctrl+C would."""

    def __call__(self, input_ids, scores):
        raise KeyboardInterrupt


torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, eos_token_id=None, pad_token_id=0, initializer_range=0.2,
)).eval()
ids = torch.randint(1, 64, (1, 6))
options = dict(assistant_early_exit=1, do_sample=False, max_new_tokens=8)
with torch.no_grad():
    before = model(ids).logits
    model.generate(ids, **options)
    unharmed = torch.equal(model(ids).logits, before)
    try:
        model.generate(ids, logits_processor=[StopOnce()], **options)
    except KeyboardInterrupt:
        pass
    difference = float((model(ids).logits - before).abs().max() / before.abs().max())
model.save_pretrained("model")
saved = json.load(open("model/config.json"))["num_hidden_layers"]
print(f"after a call that ends normally: same logits {unharmed}")
print(f"after one that is interrupted: {len(model.model.layers)} layers in the model, "
      f"config.num_hidden_layers = {model.config.num_hidden_layers}, saved {saved}, "
      f"logits changed by {difference:.2g} of the largest")
print("expected: 4 layers and the same logits after both")
if not unharmed or model.config.num_hidden_layers != 1 or saved != 1 or difference < 1e-3:
    sys.exit("the behavior has changed")
print("found: the model is a smaller one until it is loaded again, and so is what is saved")
PYTHON
