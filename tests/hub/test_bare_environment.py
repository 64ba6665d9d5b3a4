"""A pushed model where nothing is installed but torch, transformers and what those need."""

from __future__ import annotations

import subprocess

from test_push import REPO, recursify

from helpers.environments import make_environment

LOAD = """
import importlib.util, sys
for absent in ("recursify", "accelerate", "peft", "datasets", "trl"):
    assert importlib.util.find_spec(absent) is None, absent
from transformers import AutoModelForCausalLM, AutoTokenizer

name = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
written = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=5, do_sample=False)
print(type(model).__name__, written.shape[1])
"""


def test_a_pushed_model_loads_and_generates(hub, folder, tmp_path):
    """From the Hub, by its name, into an empty cache."""
    recursify(hub, tmp_path / "pusher", "push", str(folder), REPO)
    python = make_environment(tmp_path / "bare", "torch", "transformers")
    environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        [str(python), "-c", LOAD, REPO], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["RecursiveForCausalLM", str(len("Once") + 5)]
