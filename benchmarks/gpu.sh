#!/usr/bin/env bash
# The GPU programme: kernels natively against their references, then how fast they are. One command, ten minutes at most.
#
#   PYTHON=python benchmarks/gpu.sh [FOLDER]
#
# It needs pip install -e '.[dev]'. Tables go to FOLDER, benchmarks/results by default, where docs/results.md takes new
# ones in. A failing test ends it before anything is timed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUTPUT=$(realpath -m "${1:-benchmarks/results}")
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}

$PYTHON - <<'END'
import sys, torch
sys.exit(None if torch.cuda.is_available() else "There is no GPU that torch can use: nothing has run.")
END

COMMANDS=(
  # Most of the time goes into compiling, which a process per kernel shares out.
  "timeout 270 $PYTHON -m pytest -p no:cacheprovider -n 8 --dist loadgroup tests/kernels/test_kernels.py -k cuda"
  "timeout 300 $PYTHON benchmarks/kernel_speed.py --time-only --output $OUTPUT"
  # The engine's benchmarks go here, one command a line; what they take comes off the ten minutes.
)
for command in "${COMMANDS[@]}"; do
  echo "+ $command"
  $command
done
