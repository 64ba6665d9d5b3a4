"""Where a check of a kernel takes its tensors from: random, between guards, and what is not written is NaN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from helpers.tolerances import KERNELS

GUARD = 1024
"""Elements before and behind; more than a row of any check has."""
UNTOUCHED = -777
"""What integers are before something is written; floats are NaN."""


class Bench:
    """Tensors of one check.

    Args:
        device: Where the kernel runs.
        dtype: Of its floats.
        seed: Of everything drawn.
    """

    def __init__(self, device: str, dtype: torch.dtype, seed: int):
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.guarded: list[tuple[Tensor, int]] = []

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal, between guards."""
        return self.guard(torch.randn(*shape, generator=self.generator).to(dtype or self.dtype))

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """From ``low`` to ``high - 1``."""
        return torch.randint(low, high, shape, generator=self.generator).to(dtype).to(self.device)

    def permutation(self, count: int) -> Tensor:
        """Int32, of ``count`` numbers."""
        return torch.randperm(count, generator=self.generator).to(torch.int32).to(self.device)

    def integers(self, values: Sequence[int] | Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(values).to(dtype).to(self.device)

    def guard(self, values: Tensor) -> Tensor:
        """A copy of ``values`` with NaN before and behind it, which must stay, and which a kernel must not read."""
        held = self._between_guards(values.shape, values.dtype)
        return held.copy_(values)

    def _between_guards(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        filling = float("nan") if dtype.is_floating_point else (UNTOUCHED if dtype.is_signed else 0)
        whole = torch.full((count + 2 * GUARD,), filling, dtype=dtype, device=self.device)
        self.guarded.append((whole, count))
        return whole[GUARD : GUARD + count].view(*shape)

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        """Memory that a launcher takes is NaN between guards."""

        def empty(*shape, dtype=torch.float32, device=None):
            return self._between_guards(shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape, dtype)

        with patch("torch.empty", empty):
            yield
        for whole, count in self.guarded:
            ends = torch.cat([whole[:GUARD], whole[GUARD + count :]])
            untouched = ends.isnan() if ends.is_floating_point() else ends == (UNTOUCHED if ends.dtype.is_signed else 0)
            assert untouched.all(), f"written outside a {whole.dtype} tensor of {count} elements"

    def assert_close(self, found: Tensor, expected: Tensor, factor: float = 1.0) -> None:
        """By :data:`tolerances.KERNELS`, ``factor`` times; NaN equals nothing."""
        atol, rtol = KERNELS[self.dtype]
        expected = expected.to(found.device, torch.float32)
        torch.testing.assert_close(found.float(), expected, atol=factor * atol, rtol=factor * rtol)
