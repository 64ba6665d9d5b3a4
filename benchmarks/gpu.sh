#!/usr/bin/env bash
# The GPU programme: kernels and graphs natively, then how fast they are. One command, ten minutes at most.
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

TESTS=(
  # Most of the time goes into compiling, which a process per kernel shares out.
  "timeout 160 $PYTHON -m pytest -p no:cacheprovider -n 8 --dist loadgroup tests/kernels/test_kernels.py -k cuda"
  "timeout 80 $PYTHON -m pytest -p no:cacheprovider -n 6 tests/engine/test_device_loop.py -k cuda"
)
LOOP="$PYTHON benchmarks/device_loop.py --device cuda --dtype bfloat16"
TABLES=(
  "timeout 140 $PYTHON benchmarks/kernel_speed.py --time-only --output $OUTPUT"
  "timeout 70 $LOOP --shape 1.7B --slots 1 64 --new 128 --output $OUTPUT/device_loop_1_7B.md"
  "timeout 60 $LOOP --shape 8B --slots 1 64 --new 64 --output $OUTPUT/device_loop_8B.md"
  # The last, since compiling may take longer than there is.
  "timeout 90 $LOOP --shape 1.7B --slots 1 --new 128 --compiled --output $OUTPUT/device_loop_compiled.md"
)
for command in "${TESTS[@]}"; do
  echo "+ $command"
  $command
done
missing=0
for command in "${TABLES[@]}"; do  # one that fails is no reason to do without the others
  echo "+ $command"
  $command || missing=1
done
exit $missing
