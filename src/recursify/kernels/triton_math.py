"""Functions that several Triton kernels share. Only those import it, since it needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def soft_capped(x, CAP: tl.constexpr):
    """``CAP · tanh(x / CAP)``, in float32.

    Triton's interpreter has no tanh. This form is exact to 1e-7 of ``CAP``, and its limits are correct where the
    exponential is infinite or 0.
    """
    return CAP * (1 - 2 / (1 + tl.exp(x * (2 / CAP))))


def tile_of(size: int, smallest: int = 1, largest: int = 1 << 20) -> int:
    """Smallest power of two that covers ``size``, within bounds."""
    return max(smallest, min(largest, triton.next_power_of_2(max(1, size))))
