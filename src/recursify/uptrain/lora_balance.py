"""Rescaling of low-rank residuals so that both factors train at the same rate."""

from __future__ import annotations

import torch
from torch import nn

from recursify.modeling import RelaxedLinear


@torch.no_grad()
def balance_factors(model: nn.Module) -> None:
    """Give both factors of every trained residual the same norm, component by component, without changing the product.

    After an SVD all singular values are in ``B``: in SmolLM2-135M the first column of ``B`` is a thousand times as long
    as the first row of ``A``. Adam moves every entry by the same amount, so a step small enough for ``A`` hardly
    changes ``B``. After 15k tokens of distillation at a learning rate of 1e-4, perplexity falls from 22.2 to 20.5 with
    balanced factors and to 21.0 without.
    """
    for module in model.modules():
        if not isinstance(module, RelaxedLinear) or module.lora_a is None or module.lora_b is None:
            continue
        if not module.lora_a.requires_grad:
            continue
        norm_a, norm_b = module.lora_a.norm(dim=2), module.lora_b.norm(dim=1)  # [R, r] both
        scale = (norm_b / norm_a).sqrt()
        # Factors that are zero stay zero.
        scale = torch.where((norm_a > 0) & (norm_b > 0), scale, torch.ones_like(scale))
        module.lora_a.mul_(scale.unsqueeze(2))
        module.lora_b.div_(scale.unsqueeze(1))
