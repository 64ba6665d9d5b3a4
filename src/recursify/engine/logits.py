"""Run the coda and compute logits for tokens that exited.

Shape legend: n tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .chunk import Chunk, ExitedTokens
from .layers.batch import TokenSpan
from .layers.model_runner import ModelRunner


class LogitsHead:
    """Coda and LM head for chunks whose tokens have all exited."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        decoder = runner.decoder
        self.last_depth = decoder.num_depths - 1
        self.exits_run_coda, self.exits_share_head = decoder.exits_run_coda, decoder.exits_share_head

    def run_coda(self, chunks: Sequence[Chunk]) -> None:
        """Replace the states of exited tokens by the coda's output, for those that run it."""
        running: list[tuple[Chunk, ExitedTokens]] = []
        for chunk in chunks:
            for tokens in chunk.exited:
                if tokens.depth < self.last_depth and not self.exits_run_coda:
                    continue
                if chunk.exit_states is not None and len(tokens.positions) == 1:
                    tokens.states = chunk.exit_states[None]  # the exit test has run the coda
                    continue
                running.append((chunk, tokens))
        if not running or not self.runner.decoder.coda:
            return
        spans = [TokenSpan(chunk.request, None, tokens.positions) for chunk, tokens in running]
        states = self.runner.coda(spans, torch.cat([tokens.states for _, tokens in running]))
        sizes = [len(span.positions) for span in spans]
        for (_, tokens), output in zip(running, states.split(sizes), strict=True):
            tokens.states = output

    def logits(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits ``[n, V]`` of the last token of each chunk."""
        exited = [chunk.last_exited() for chunk in chunks]
        by_head: dict[int | None, list[int]] = {}  # chunks by the depth of their exit head; None for the LM head
        rows: dict[int, Tensor] = {}
        for index, (chunk, tokens) in enumerate(zip(chunks, exited, strict=True)):
            if chunk.exit_logits is not None:
                rows[index] = chunk.exit_logits
                continue
            uses_lm_head = self.exits_share_head or tokens.depth == self.last_depth
            by_head.setdefault(None if uses_lm_head else tokens.depth, []).append(index)
        for depth, indices in by_head.items():
            states = torch.stack([exited[index].states[-1] for index in indices])
            runner = self.runner
            logits = runner.compute_logits(states) if depth is None else runner.compute_exit_logits(depth, states)
            if len(indices) == len(chunks):
                return logits
            rows.update(zip(indices, logits, strict=True))
        return torch.stack([rows[index] for index in range(len(chunks))])
