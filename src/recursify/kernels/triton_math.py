"""What several Triton kernels compute alike. Imported by those alone, since it needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def soft_capped(x, CAP: tl.constexpr):
    """``CAP · tanh(x / CAP)``, in float32.

    The interpreter has no tanh. This form is exact to 1e-7 of ``CAP``, and at either end the exponential's infinity or
    zero gives the right limit.
    """
    return CAP * (1 - 2 / (1 + tl.exp(x * (2 / CAP))))


def tile_of(size: int, smallest: int = 1, largest: int = 1 << 20) -> int:
    """The power of two that covers ``size``, between two bounds."""
    return max(smallest, min(largest, triton.next_power_of_2(max(1, size))))
