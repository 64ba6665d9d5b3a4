"""Tensors for checks of kernels: random, between guards, and NaN where nothing has been written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from helpers.tolerances import KERNELS

GUARD = 1024
"""Number of guard elements before and after a tensor, more than a row of any check has."""
UNTOUCHED = -777
"""Value of integers that have not been written; floats are NaN."""


class Bench:
    """Tensors of one check.

    Args:
        device: Device of the kernel.
        dtype: Dtype of floating-point tensors.
        seed: Seed of all random numbers.
    """

    def __init__(self, device: str, dtype: torch.dtype, seed: int):
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.guarded: list[tuple[Tensor, int]] = []

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal random numbers between guards."""
        return self.guard(torch.randn(*shape, generator=self.generator).to(dtype or self.dtype))

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Random integers from ``low`` to ``high - 1``."""
        return torch.randint(low, high, shape, generator=self.generator).to(dtype).to(self.device)

    def permutation(self, count: int) -> Tensor:
        """Random permutation of ``count`` numbers, int32."""
        return torch.randperm(count, generator=self.generator).to(torch.int32).to(self.device)

    def integers(self, values: Sequence[int] | Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(values).to(dtype).to(self.device)

    def guard(self, values: Tensor) -> Tensor:
        """Copy of ``values`` with NaN before and after it, which a kernel must neither read nor write."""
        return self._between_guards(values.shape, values.dtype).copy_(values)

    def _between_guards(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        value = float("nan") if dtype.is_floating_point else (UNTOUCHED if dtype.is_signed else 0)
        whole = torch.full((count + 2 * GUARD,), value, dtype=dtype, device=self.device)
        self.guarded.append((whole, count))
        return whole[GUARD : GUARD + count].view(*shape)

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        """Context in which ``torch.empty`` returns NaN between guards, and which checks all guards at the end."""

        def empty(*shape, dtype=torch.float32, device=None):
            return self._between_guards(shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape, dtype)

        with patch("torch.empty", empty):
            yield
        for whole, count in self.guarded:
            ends = torch.cat([whole[:GUARD], whole[GUARD + count :]])
            untouched = ends.isnan() if ends.is_floating_point() else ends == (UNTOUCHED if ends.dtype.is_signed else 0)
            assert untouched.all(), f"written outside a {whole.dtype} tensor of {count} elements"

    def assert_close(self, found: Tensor, expected: Tensor, factor: float = 1.0) -> None:
        """Compare within ``factor`` times :data:`tolerances.KERNELS`; NaN equals nothing."""
        atol, rtol = KERNELS[self.dtype]
        expected = expected.to(found.device, torch.float32)
        torch.testing.assert_close(found.float(), expected, atol=factor * atol, rtol=factor * rtol)
