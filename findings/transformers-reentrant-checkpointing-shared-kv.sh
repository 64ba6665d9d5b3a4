#!/usr/bin/env bash
# transformers: reentrant gradient checkpointing of a model that shares keys and values drops gradients, silently.
#
# Expected: gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True}) changes memory and
#           time, not the gradients (or raises for models that it does not support).
# Found: in Gemma 3n (num_kv_shared_layers > 0) the loss is the same to the bit and gradients of nearly all weights up to
#        the layer that provides the keys and values are wrong, by about half of their norm: the part that flows through
#        the shared keys and values is missing. With use_reentrant=False all are right.
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
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

transformers.logging.set_verbosity_error()
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
NUM_LAYERS, NUM_SHARED = 6, 3


def gradients(num_shared, checkpointing):
    torch.manual_seed(0)
    model = Gemma3nForCausalLM(Gemma3nTextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=64, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_kv_shared_layers=num_shared, layer_types=["full_attention"] * NUM_LAYERS,
        activation_sparsity_pattern=[0.0] * NUM_LAYERS, altup_num_inputs=2, laurel_rank=4,
    )).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    ids = torch.randint(0, 64, (2, 10))
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def wrong(num_shared, checkpointing):
    loss, expected = gradients(num_shared, None)
    checkpointed_loss, found = gradients(num_shared, checkpointing)
    assert expected.keys() == found.keys()
    errors = {name: float((found[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-12))
              for name in expected}
    bad = {name: error for name, error in errors.items() if error > 0.01}
    print(f"{num_shared} of {NUM_LAYERS} layers share keys and values, {checkpointing}: loss {loss:.6f} and "
          f"{checkpointed_loss:.6f}; {len(bad)} of {len(errors)} gradients are wrong"
          + (f", in the median by {sorted(bad.values())[len(bad) // 2]:.0%} of their norm" if bad else ""))
    return bad, loss == checkpointed_loss


not_reentrant, _ = wrong(NUM_SHARED, {"use_reentrant": False})
nothing_shared, _ = wrong(0, {"use_reentrant": True})
reentrant, is_same_loss = wrong(NUM_SHARED, {"use_reentrant": True})
print("expected: the same gradients three times, or an exception")
if not_reentrant or nothing_shared or not is_same_loss or len(reentrant) < 10:
    sys.exit("the behavior has changed")
print("found: with shared keys and values, reentrant checkpointing trains on wrong gradients; the loss does not show it")
PYTHON
