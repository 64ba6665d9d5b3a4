"""What an exit says and how sure it is, in plain PyTorch.

Shape legend: N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ExitStatistics(NamedTuple):
    """Of ``N`` rows, each ``[N]``.

    Attributes:
        choice: Int64, the entry with the highest logit, of equal ones the first.
        top1: Float32, its logit.
        top2: Float32, the highest logit of the others; ``-inf`` where there are none.
        log_sum_exp: Float32, of all logits.
        entropy: Float32, of their softmax, in nats.
    """

    choice: Tensor
    top1: Tensor
    top2: Tensor
    log_sum_exp: Tensor
    entropy: Tensor

    @property
    def margin(self) -> Tensor:
        """``[N]``: the first logit less the second."""
        return self.top1 - self.top2

    @property
    def probability_margin(self) -> Tensor:
        """``[N]``: the first probability less the second."""
        return (self.top1 - self.log_sum_exp).exp() - (self.top2 - self.log_sum_exp).exp()


def exit_statistics(states: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> ExitStatistics:
    """Of ``states [N, H]``, ``weight [V, H]`` and ``bias [V]``; logits are made in their dtype, the rest in float32."""
    logits = F.linear(states, weight, bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    choice = logits.argmax(-1)
    top1 = logits.gather(-1, choice[:, None])[:, 0]
    others = logits.scatter(-1, choice[:, None], -torch.inf)
    log_sum_exp = logits.logsumexp(-1)
    log_p = logits - log_sum_exp[:, None]
    # Where a logit is -inf its probability is 0, and has no part in the entropy.
    entropy = -torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p).sum(-1)
    return ExitStatistics(choice, top1, others.amax(-1), log_sum_exp, entropy)
