"""The code in a checkpoint: exactly what its configuration uses, and enough to load without recursify."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.tiny_models import random_ids, tiny_recursive
from recursify.checkpoint.record import travelling_code
from recursify.errors import HubError
from recursify.modeling import ExitSettings, RecursiveConfig, RecursiveForCausalLM, make_policy, travelling_files

PLAIN = {
    "configuration_recursive.py",
    "modeling_recursive.py",
    "recursive_base.py",
    "recursive_exits.py",
    "recursive_generation.py",
    "recursive_layers.py",
    "recursive_layout.py",
    "recursive_overrides.py",
}
EXITS = PLAIN | {
    "modeling_recursive_exits.py",
    "recursive_columns.py",
    "recursive_decoding.py",
    "recursive_exit_generation.py",
    "recursive_exit_settings.py",
    "recursive_policies.py",
    "recursive_rope.py",
    "recursive_speculation.py",
}
ROUTED = PLAIN | {
    "modeling_recursive_routed.py",
    "recursive_routed_cache.py",
    "recursive_routed_walk.py",
    "recursive_routing.py",
}
ANDERSON = PLAIN | {"modeling_recursive_anderson.py"}

FIRST_FORMAT = "39a0e3c"
OLD_FILES = (
    "configuration_recursive.py",
    "recursive_layout.py",
    "recursive_loops.py",
    "recursive_exits.py",
    "recursive_thresholds.py",
    "recursive_policies.py",
    "recursive_decoding.py",
    "recursive_speculation.py",
    "recursive_routing.py",
    "recursive_routed_cache.py",
    "recursive_routed_walk.py",
    "modeling_recursive.py",
)
OLD_MAP = {
    "AutoConfig": "configuration_recursive.RecursiveConfig",
    "AutoModel": "modeling_recursive.RecursiveModel",
    "AutoModelForCausalLM": "modeling_recursive.RecursiveForCausalLM",
}

BARE = """
import json, sys
sys.modules["recursify"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM

folder, options = sys.argv[1], json.loads(sys.argv[2])
AutoModel.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.tensor([[3, 4, 5, 6]])
with torch.inference_mode():
    logits = model(ids).logits[0, -1].tolist()
try:
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)[0].tolist()
except ValueError as error:
    tokens = str(error)
if len(sys.argv) > 3:
    model.save_pretrained(sys.argv[3])
print(json.dumps([logits, tokens]))
"""


def load_bare(folder: Path, home: Path, *more: str, **options) -> list:
    """Last logits and greedy tokens (or the error) of a process without recursify, by the folder's own code."""
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", BARE, str(folder), json.dumps(options), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def plain() -> RecursiveForCausalLM:
    return tiny_recursive(varied=True)


def with_exits() -> RecursiveForCausalLM:
    model = plain()
    model.add_exit_heads("norm")
    return model


def routed() -> RecursiveForCausalLM:
    model = plain()
    model.add_routers("expert_choice", router_capacities=[1, 0.5])
    return model


def looped() -> RecursiveForCausalLM:
    return plain().with_recursions(4, anderson=2)


def scaled() -> RecursiveForCausalLM:
    return plain().with_recursions(3)


def calibrated() -> RecursiveForCausalLM:
    model = plain()
    model.config.exit_policy, model.config.exit_thresholds = "confidence", [0.5]
    return model


KINDS = [
    (plain, PLAIN),
    (scaled, PLAIN),
    (with_exits, EXITS),
    (calibrated, EXITS),
    (routed, ROUTED),
    (looped, ANDERSON),
]


@pytest.mark.parametrize(("make", "files"), KINDS)
def test_a_checkpoint_holds_what_it_uses_and_loads_anywhere(make, files, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").glob("*.py")} == files
    assert set(travelling_files(model.config)) == set(travelling_code(tmp_path / "model")) == files
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.inference_mode():
        expected = model(ids).logits[0, -1]
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()
    logits, generated = load_bare(tmp_path / "model", tmp_path, str(tmp_path / "again"))
    torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-6, rtol=0)
    assert generated == tokens
    # Saved by the checkpoint's own class, it has the same code and loads in both worlds.
    assert {file.name for file in (tmp_path / "again").glob("*.py")} == files
    assert load_bare(tmp_path / "again", tmp_path)[1] == tokens
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits[0, -1], expected)


def test_exit_policies_without_their_code(tmp_path):
    """A plain folder has none; recursify, once installed, exits from it all the same."""
    plain().save_pretrained(tmp_path / "plain")
    with_exits().save_pretrained(tmp_path / "exits")
    _, error = load_bare(tmp_path / "plain", tmp_path, exit_policy="confidence")
    assert "does not carry the code of exit policies" in error
    assert "Install recursify" in error
    assert len(load_bare(tmp_path / "exits", tmp_path, exit_policy="confidence")[1]) == 10
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    settings = ExitSettings(make_policy("fixed", 0))
    assert loaded.generate(random_ids(1, 4), exit_policy=settings, max_new_tokens=3).shape == (1, 7)


def test_what_a_plain_class_lacks_is_refused(tmp_path):
    """A routed configuration in the hands of the plain class."""
    from recursify.modeling import modeling_recursive

    config = RecursiveConfig(**{**plain().config.to_dict(), "router": "expert_choice"})
    with pytest.raises(ValueError, match=r"router=expert_choice needs code that .* Install recursify"):
        modeling_recursive.RecursiveForCausalLM(config)


def old_file(name: str) -> bytes:
    """A file of the package as of the first format, from the history of this repository; skips without it."""
    command = ["git", "show", f"{FIRST_FORMAT}:src/recursify/modeling/{name}"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True)
    if done.returncode:
        pytest.skip("needs the history of the repository")
    return done.stdout


@pytest.mark.parametrize("make", [plain, with_exits, routed, looped])
def test_folders_made_before_still_load(make, tmp_path):
    """They carry all twelve files, whatever they use, and one class for every model."""
    model, folder = make(), tmp_path / "model"
    model.save_pretrained(folder)
    for file in folder.glob("*.py"):
        file.unlink()
    for name in OLD_FILES:
        (folder / name).write_bytes(old_file(name))
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**fields, "auto_map": OLD_MAP}), encoding="utf-8")
    assert set(travelling_code(folder)) == set(OLD_FILES)
    ids = torch.tensor([[3, 4, 5, 6]])
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()
    assert load_bare(folder, tmp_path)[1] == tokens
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(loaded) is RecursiveForCausalLM
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    shutil.copytree(folder, tmp_path / "again")
    loaded.save_pretrained(tmp_path / "again")
    assert {file.name for file in (tmp_path / "again").glob("*.py")} == set(travelling_files(model.config))


def test_push_to_hub_is_the_checked_one():
    with pytest.raises(HubError, match=r"push_to_hub\(\) of a recursive model does not support create_pr"):
        plain().push_to_hub("me/model", create_pr=True)
