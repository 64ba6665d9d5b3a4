"""LoRA factors on disk: the residuals of one module at all depths, stacked."""

from __future__ import annotations

import torch
from torch import Tensor

from recursify.checkpoint.dense_names import StoredModule
from recursify.checkpoint.writer import ShardedCheckpoint

Factors = tuple[Tensor, Tensor]
"""``(B [O, r], A [r, I])``."""


def write_factors(output: ShardedCheckpoint, module: StoredModule, factors: list[Factors]) -> None:
    """Write the factors of ``module`` at all depths."""
    output.write(f"{module.name}.lora_b", torch.stack([b for b, _ in factors]))
    output.write(f"{module.name}.lora_a", torch.stack([a for _, a in factors]))


def write_factors_at(output: ShardedCheckpoint, module: StoredModule, depth: int, factors: Factors) -> None:
    """Replace the factors of ``module`` at one depth; all depths were written before."""
    for name, factor in zip(("lora_b", "lora_a"), factors, strict=True):
        stacked = output.read(f"{module.name}.{name}")
        stacked[depth] = factor.to(stacked.dtype)
        output.write(f"{module.name}.{name}", stacked)


def read_merged(output: ShardedCheckpoint, module: StoredModule, depth: int) -> Tensor:
    """Shared weight plus residual at one depth, as written, float32 ``[O, I]``."""
    weight = output.read(f"{module.name}.linear.weight").float()
    if module.rank:
        b, a = (output.read(f"{module.name}.{name}")[depth].float() for name in ("lora_b", "lora_a"))
        weight += b @ a
    return weight
