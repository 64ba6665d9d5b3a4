#!/usr/bin/env bash
# Native tests and benchmarks of kernels and CUDA graphs on a GPU, in at most ten minutes.
#
#   PYTHON=python benchmarks/gpu.sh [FOLDER]
#
# It needs pip install -e '.[dev]'. Tables are written to FOLDER, by default benchmarks/results, from where docs/results.md
# includes them. A failing test ends the script before anything is timed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUTPUT=$(realpath -m "${1:-benchmarks/results}")
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}

$PYTHON - <<'END'
import sys, torch
sys.exit(None if torch.cuda.is_available() else "torch finds no GPU: nothing has run.")
END

TESTS=(
  # Most of the time is compilation, which one process per kernel parallelizes.
  "timeout 160 $PYTHON -m pytest -p no:cacheprovider -n 8 --dist loadgroup tests/kernels/test_kernels.py -k cuda"
  "timeout 80 $PYTHON -m pytest -p no:cacheprovider -n 6 tests/engine/device_loop -k cuda"
)
LOOP="$PYTHON benchmarks/device_loop.py --device cuda --dtype bfloat16"
TABLES=(
  "timeout 140 $PYTHON benchmarks/kernel_speed.py --time-only --output $OUTPUT"
  "timeout 70 $LOOP --shape 1.7B --slots 1 64 --new 128 --output $OUTPUT/device_loop_1_7B.md"
  "timeout 60 $LOOP --shape 8B --slots 1 64 --new 64 --output $OUTPUT/device_loop_8B.md"
  # Last, since compiling may exceed the time limit.
  "timeout 90 $LOOP --shape 1.7B --slots 1 --new 128 --compiled --output $OUTPUT/device_loop_compiled.md"
)
for command in "${TESTS[@]}"; do
  echo "+ $command"
  $command
done
missing=0
for command in "${TABLES[@]}"; do  # a failing table does not stop the others
  echo "+ $command"
  $command || missing=1
done
exit $missing
