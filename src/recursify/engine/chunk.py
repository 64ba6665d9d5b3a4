"""What is on its way through the depths: a request's next token, or a chunk of its prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .request import Request


@dataclass
class ExitedTokens:
    """Tokens that have left the block.

    Attributes:
        positions: Of the tokens.
        states: ``[n, D]`` as they left.
        depth: The last that they ran; -1 for none.
    """

    positions: list[int]
    states: Tensor
    depth: int


class Chunk:
    """Tokens of one request, entered together. A request has one flight at a time.

    Args:
        request: Whose.
        count: How many of its tokens, from the first that has not been computed.

    Attributes:
        depth: Of the recursion that runs next.
        positions: Tokens that run it, ascending; those that had been waiting for the depth are among them.
        states: What enters it, ``[n, D]``.
        departures: What has left.
        embedded: Of the last token ``[D]``: what it was before the first layer.
        entered: What entered the recursion that runs next: of the last token ``[D]``, or in a routed model of all.
        exit_states: Of the last token ``[D]``, where an exit test has run the coda for it already.
        exit_logits: Of the last token ``[V]``, likewise.
        previous_logits: Of the last token ``[V]`` at the exit before, for policies that compare.
        gates: In a routed model: of the recursion that runs next, ``[n]``.
        choices: In token choice: the last depth of each token, ``[n]``.
        weights: In token choice: the gate of each token's last recursion, ``[n]``.
        first: In token choice: what entered the first recursion, ``[n, D]``.
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
        """Ids of the tokens that entered."""
        return self.request.tokens[self.start : self.stop]

    @property
    def samples_token(self) -> bool:
        """Whether a new token is read from its last one."""
        return self.stop == len(self.request.tokens)

    @property
    def is_new(self) -> bool:
        """Whether it is a new token, of which it is not known where it leaves."""
        return self.start == self.request.prompt_length + len(self.request.exit_depths)

    @property
    def is_done(self) -> bool:
        """Whether all of it has left."""
        return not self.positions

    def exit_tokens(self, positions: list[int], states: Tensor, depth: int) -> None:
        """``positions`` have left after ``depth``."""
        if positions:
            self.exited.append(ExitedTokens(positions, states, depth))

    def last_exited(self) -> ExitedTokens:
        """Of its last token."""
        return next(each for each in reversed(self.exited) if each.positions[-1] == self.stop - 1)


def known(tensor: Tensor | None) -> Tensor:
    """A tensor of a flight that has come far enough to have it."""
    assert tensor is not None
    return tensor
