"""Residuals in a form that trains well."""

from __future__ import annotations

import torch
from torch import nn

from recursify.modeling import RelaxedLinear


@torch.no_grad()
def balance_factors(model: nn.Module) -> None:
    """Give both factors of every trained residual the same norm, component by component; their product stays.

    An SVD leaves all singular values in ``B``: on SmolLM2-135M the first column of ``B`` is a thousand times as long as
    the first row of ``A``. Adam moves every entry by the same amount, so a step small enough for ``A`` leaves ``B``
    where it was. After 15k tokens of distillation at a learning rate of 1e-4 perplexity is 20.5 with balanced factors
    and 21.0 without, from 22.2.
    """
    for module in model.modules():
        if not isinstance(module, RelaxedLinear) or module.lora_a is None or module.lora_b is None:
            continue
        if not module.lora_a.requires_grad:
            continue
        of_a, of_b = module.lora_a.norm(dim=2), module.lora_b.norm(dim=1)  # each [R, r]
        scale = (of_b / of_a).sqrt()
        scale = torch.where((of_a > 0) & (of_b > 0), scale, torch.ones_like(scale))  # LoRA at zero stays so
        module.lora_a.mul_(scale.unsqueeze(2))
        module.lora_b.div_(scale.unsqueeze(1))
