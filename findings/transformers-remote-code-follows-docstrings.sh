#!/usr/bin/env bash
# transformers: trust_remote_code needs every file that a line "from .x import" names, be it in a docstring.
#
# Expected: modeling code from a folder loads if Python can import it. An example in a docstring is text; an import under
#           TYPE_CHECKING, in a function that is not called or in try/except ImportError is optional.
# Cause: the loader finds imports by a regular expression.
# Found: all four are followed, and the model does not load with FileNotFoundError although "import" works. Comments are
#        not.
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
import importlib.util
import json
import sys
from pathlib import Path

import transformers
from transformers import AutoConfig

print(f"transformers {transformers.__version__}")
CLASS = """
from transformers import PreTrainedConfig

class MineConfig(PreTrainedConfig):
    model_type = "mine"
"""
STARTS = {
    "nothing": "",
    "comment": "# from .extra import thing\n",
    "docstring": '"""Configuration.\n\nExample::\n\n    from .extra import thing\n"""\n',
    "function that is not called": "def plot():\n    from .extra import thing\n",
    "try/except ImportError": "try:\n    from .extra import thing\nexcept ImportError:\n    thing = None\n",
    "TYPE_CHECKING": "import typing\n\nif typing.TYPE_CHECKING:\n    from .extra import thing\n",
}
outcomes = {}
for number, (name, start) in enumerate(STARTS.items()):
    folder = Path(f"model{number}")
    folder.mkdir()
    file = folder / "configuration_mine.py"
    file.write_text(start + CLASS)
    auto_map = {"AutoConfig": "configuration_mine.MineConfig"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto_map}))
    spec = importlib.util.spec_from_file_location("mine", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # Python itself imports it
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
        outcomes[name] = "loads"
    except FileNotFoundError as error:
        outcomes[name] = type(error).__name__
    print(f"{name}: imported by Python, {outcomes[name]} in transformers")
print("expected: all load")
if outcomes != {name: "loads" if name in ("nothing", "comment") else "FileNotFoundError" for name in STARTS}:
    sys.exit("the behavior has changed")
print("found: an import that is never run keeps a model from loading")
PYTHON
