"""Largest allowed differences, per dtype: one table for all tests, the same in CI as at a desk."""

import torch

LOGITS = {
    torch.float32: 1e-4,  # logits of order 1 after six layers; measured 4e-5 with residuals of full rank
    torch.bfloat16: 1.5e-1,  # 8 bits of mantissa, relative to logits of deviation 1; measured 8e-2
    torch.float16: 2e-2,  # 11 bits; measured 1e-2
}
"""Absolute, on logits of tiny random models."""

LOSSES = {
    torch.bfloat16: 1e-2,  # six steps of six layers; measured 3.3e-3
}
"""Absolute, in nats per token, of tiny models while they are trained."""

KERNELS = {
    torch.float32: (2e-5, 2e-5),  # sums of a thousand products in another order
    torch.float16: (4e-3, 4e-3),  # one rounding of what is stored, 5e-4, and of weights before a product
    torch.bfloat16: (3e-2, 3e-2),  # the same with 8 bits of mantissa
}
"""Absolute and relative, of a kernel in Triton against its reference in float32 on the same inputs."""
