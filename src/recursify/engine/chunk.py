"""Scheduled chunk: the next token or prompt chunk of a request, in progress through the recursions.

Shape legend: n tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .request import Request


@dataclass
class ExitedTokens:
    """Tokens that exited the block together.

    Attributes:
        positions: Positions of the tokens.
        states: Hidden states ``[n, D]`` at the exit.
        depth: Last depth that the tokens ran; -1 for none.
    """

    positions: list[int]
    states: Tensor
    depth: int


class Chunk:
    """Next ``count`` tokens of a request, which enter together. A request has one chunk at a time.

    Attributes:
        depth: Depth of the next recursion.
        positions: Ascending positions of the tokens that run it, including deferred tokens that catch up there.
        states: Input of that recursion, ``[n, D]``.
        exited: Tokens that exited.
        embedded: Embedding ``[D]`` of the last token.
        entered: Input of the next recursion: that of the last token ``[D]``, or in a routed model of all tokens.
        exit_states: State ``[D]`` of the last token after the coda, if an exit test computed it.
        exit_logits: Logits ``[V]`` of the last token, if an exit test computed them.
        previous_logits: Logits ``[V]`` of the last token at the exit before, for policies that compare.
        gates: Gates ``[n]`` of the next recursion, in a routed model.
        choices: Last depth ``[n]`` of each token, in token-choice routing.
        weights: Gate ``[n]`` of each token's last recursion, in token-choice routing.
        first: Input ``[n, D]`` of the first recursion, in token-choice routing.
    """

    def __init__(self, request: Request, count: int) -> None:
        self.request = request
        self.start = request.computed
        self.stop = self.start + count
        self.depth = 0
        self.positions = list(range(self.start, self.stop))
        self.states = torch.empty(0)
        self.exited: list[ExitedTokens] = []
        self.embedded: Tensor | None = None
        self.entered: Tensor | None = None
        self.exit_states: Tensor | None = None
        self.exit_logits: Tensor | None = None
        self.previous_logits: Tensor | None = None
        self.gates: Tensor | None = None
        self.choices: Tensor | None = None
        self.weights: Tensor | None = None
        self.first: Tensor | None = None

    @property
    def tokens(self) -> list[int]:
        """Token ids of the chunk."""
        return self.request.tokens[self.start : self.stop]

    @property
    def samples_token(self) -> bool:
        """True if a new token is sampled from the logits of its last token."""
        return self.stop == len(self.request.tokens)

    @property
    def is_new(self) -> bool:
        """True if it is a new token, whose exit has not been decided."""
        return self.start == self.request.prompt_length + len(self.request.exit_depths)

    @property
    def is_done(self) -> bool:
        """True if all of its tokens have exited."""
        return not self.positions

    def exit_tokens(self, positions: list[int], states: Tensor, depth: int) -> None:
        """Record that the tokens at ``positions`` exited after ``depth`` with ``states [n, D]``."""
        if positions:
            self.exited.append(ExitedTokens(positions, states, depth))

    def last_exited(self) -> ExitedTokens:
        """Exited tokens that include the last token of the chunk."""
        return next(tokens for tokens in reversed(self.exited) if tokens.positions[-1] == self.stop - 1)


def known(tensor: Tensor | None) -> Tensor:
    """Narrow the type of an attribute of a chunk that has been set by now."""
    assert tensor is not None
    return tensor
