"""Statistics of the logits at an exit, in plain PyTorch.

Shape legend: N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ExitStatistics(NamedTuple):
    """Statistics of ``N`` rows of logits, each ``[N]``.

    Attributes:
        choice: Int64, argmax; the first of equal logits.
        top1: Float32, highest logit.
        top2: Float32, highest logit of the other entries; ``-inf`` if there are none.
        log_sum_exp: Float32, log-sum-exp of all logits.
        entropy: Float32, entropy of the softmax in nats.
    """

    choice: Tensor
    top1: Tensor
    top2: Tensor
    log_sum_exp: Tensor
    entropy: Tensor

    @property
    def margin(self) -> Tensor:
        """``[N]``: highest logit minus the second highest."""
        return self.top1 - self.top2

    @property
    def probability_margin(self) -> Tensor:
        """``[N]``: highest probability minus the second highest."""
        return (self.top1 - self.log_sum_exp).exp() - (self.top2 - self.log_sum_exp).exp()


def exit_statistics(states: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> ExitStatistics:
    """Statistics of ``states [N, H]`` under ``weight [V, H]`` and ``bias [V]``: logits in their dtype, else float32."""
    logits = F.linear(states, weight, bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    choice = logits.argmax(-1)
    top1 = logits.gather(-1, choice[:, None])[:, 0]
    others = logits.scatter(-1, choice[:, None], -torch.inf)
    log_sum_exp = logits.logsumexp(-1)
    log_p = logits - log_sum_exp[:, None]
    # A logit of -inf has probability 0 and does not contribute to the entropy.
    entropy = -torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p).sum(-1)
    return ExitStatistics(choice, top1, others.amax(-1), log_sum_exp, entropy)
