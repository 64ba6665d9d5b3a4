#!/bin/sh
# Install torch into a virtual environment: install_torch.sh PYTHON REQUIREMENT CPU_INDEX
# With an NVIDIA GPU: the default build. Without: a CPU build, from a local wheel if pip knows one, else from CPU_INDEX.
set -eu
python=$1 requirement=$2 cpu_index=$3
if "$python" -c 'import torch' 2>/dev/null; then exit 0; fi
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    exec "$python" -m pip install -q "$requirement"
fi
if [ "$(uname -s)" = Darwin ]; then  # the default build for macOS has no CUDA
    exec "$python" -m pip install -q "$requirement"
fi
# What pip would take by itself: a wheel marked +cpu is a local CPU build.
found=$("$python" -m pip install --dry-run --no-deps --ignore-installed --quiet --report - "$requirement" 2>/dev/null \
    | "$python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])' || true)
case "$found" in
    *+cpu) exec "$python" -m pip install -q "$requirement" ;;
    *) exec "$python" -m pip install -q --index-url "$cpu_index" "$requirement" ;;
esac
