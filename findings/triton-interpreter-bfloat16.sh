#!/usr/bin/env bash
# Triton: the interpreter (TRITON_INTERPRET=1) computes bfloat16 arithmetic wrong, without an error.
#
# Expected: a kernel that is right in float32 and float16 is right in bfloat16, within rounding. The interpreter is how
#           kernels are tested where there is no GPU.
# Found: the interpreter keeps bfloat16 as the bits of a uint16 and computes on those: sums, products and maxima
#        are wrong, by up to 1e38 or NaN. Loads, stores and casts are right, so casting to float32 after each load
#        is a workaround.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$venv/bin/pip" install --quiet torch==2.13.0
"$venv/bin/pip" install --quiet numpy==2.4.6 triton==3.9.0
cd "$folder"
"$venv/bin/python" -W ignore - <<'PYTHON'
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy
import torch
import triton

# Triton reads the source of a kernel, so it needs a file.
source = '''
import triton
import triton.language as tl

@triton.jit
def add(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))

@triton.jit
def multiply(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i) * tl.load(y + i))

@triton.jit
def maximum(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.maximum(tl.load(x + i), tl.load(y + i)))

@triton.jit
def add_after_cast(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    total = tl.load(x + i).to(tl.float32) + tl.load(y + i).to(tl.float32)
    tl.store(out + i, total.to(tl.bfloat16))
'''
with open("kernels.py", "w") as file:
    file.write(source)
sys.path.insert(0, ".")
import kernels

print(f"torch {torch.__version__}, triton {triton.__version__}, numpy {numpy.__version__}")
REFERENCES = {"add": torch.add, "multiply": torch.mul, "maximum": torch.maximum}


def error(kernel, reference, dtype):
    torch.manual_seed(0)
    x, y = torch.randn(2, 64).to(dtype)
    out = torch.zeros_like(x)
    kernel[(1,)](x, y, out, 64)
    return float((out.double() - reference(x, y).double()).abs().max())


wrong = {}
for name, reference in REFERENCES.items():
    errors = {str(dtype)[6:]: error(getattr(kernels, name), reference, dtype)
              for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    print(f"{name:9} largest error: " + ", ".join(f"{dtype} {value:.3g}" for dtype, value in errors.items()))
    assert max(errors["float32"], errors["float16"]) < 1e-2, "the kernel itself is wrong"
    wrong[name] = not errors["bfloat16"] < 1  # or NaN
cast = error(kernels.add_after_cast, torch.add, torch.bfloat16)
print(f"add, cast to float32 after the loads, bfloat16: {cast:.3g}")
print("expected: errors of bfloat16 below 0.1, or an exception")
if not all(wrong.values()) or cast > 0.1:
    sys.exit(f"the behavior has changed: {wrong}, {cast}")
print("found: bfloat16 results are wrong, and nothing says so")
PYTHON
