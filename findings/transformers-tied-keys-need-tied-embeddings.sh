#!/usr/bin/env bash
# transformers: _tied_weights_keys of a model are ignored on load unless config.tie_word_embeddings is true.
#
# Expected: a tie between two weights that are not embeddings, declared in _tied_weights_keys and present in the model,
#           survives save_pretrained() and from_pretrained().
# Found: save_pretrained() uses the declaration and writes the weight once; from_pretrained() does not, unties the two
#        and initializes the second at random. The load report calls it "newly initialized"; nothing is raised. With
#        tie_word_embeddings=True, in a model that has no embeddings, it works.
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
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

print(f"torch {torch.__version__}, transformers {transformers.__version__}")


class TwoLayerConfig(PreTrainedConfig):
    model_type = "two_layers"


class TwoLayers(PreTrainedModel):
    config_class = TwoLayerConfig
    _tied_weights_keys = {"second.weight": "first.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.post_init()

    def forward(self, states):
        return self.second(self.first(states).tanh())


outcomes = {}
for tie_word_embeddings in (False, True):
    torch.manual_seed(0)
    model = TwoLayers(TwoLayerConfig(tie_word_embeddings=tie_word_embeddings)).eval()
    model.save_pretrained("model")
    with safe_open("model/model.safetensors", framework="pt") as file:
        saved = sorted(file.keys())
    loaded, report = TwoLayers.from_pretrained("model", output_loading_info=True)
    states = torch.randn(4, 8)
    is_same = torch.allclose(model(states), loaded.eval()(states))
    is_tied = loaded.second.weight is loaded.first.weight
    outcomes[tie_word_embeddings] = (saved, is_tied, is_same, sorted(report["missing_keys"]))
    print(f"tie_word_embeddings={tie_word_embeddings}: saved {saved}, loaded tied {is_tied}, same outputs {is_same}, "
          f"missing keys {sorted(report['missing_keys'])}")
print("expected: tied and the same outputs in both cases, or an exception from save_pretrained()")
if outcomes != {
    False: (["first.weight"], False, False, ["second.weight"]),
    True: (["first.weight"], True, True, []),
}:
    sys.exit("the behavior has changed")
print("found: a round trip through a folder replaces a tied weight by random numbers")
PYTHON
