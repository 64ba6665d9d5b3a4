"""What is said by tokens that have left: the coda, and logits.

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
    """The end of the model, for flights all of whose tokens have left."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        decoder = runner.decoder
        self.last_depth = decoder.num_depths - 1
        self.exits_run_coda, self.exits_share_head = decoder.exits_run_coda, decoder.exits_share_head

    def run_coda(self, chunks: Sequence[Chunk]) -> None:
        """Replace the states of departures by what the coda makes of them, where they run it."""
        running: list[tuple[Chunk, ExitedTokens]] = []
        for chunk in chunks:
            for departure in chunk.exited:
                if departure.depth < self.last_depth and not self.exits_run_coda:
                    continue
                if chunk.exit_states is not None and len(departure.positions) == 1:
                    departure.states = chunk.exit_states[None]  # its exit test has run it
                    continue
                running.append((chunk, departure))
        if not running or not self.runner.decoder.coda:
            return
        runs = [TokenSpan(chunk.request, None, departure.positions) for chunk, departure in running]
        states = self.runner.coda(runs, torch.cat([departure.states for _, departure in running]))
        sizes = [len(run.positions) for run in runs]
        for (_, departure), made in zip(running, states.split(sizes), strict=True):
            departure.states = made

    def logits(self, chunks: Sequence[Chunk]) -> Tensor:
        """``[n, V]`` of the last token of each."""
        last = [chunk.last_exited() for chunk in chunks]
        by_head: dict[int | None, list[int]] = {}
        rows: dict[int, Tensor] = {}
        for number, (chunk, departure) in enumerate(zip(chunks, last, strict=True)):
            if chunk.exit_logits is not None:
                rows[number] = chunk.exit_logits
                continue
            alike = self.exits_share_head or departure.depth == self.last_depth
            by_head.setdefault(None if alike else departure.depth, []).append(number)
        for depth, numbers in by_head.items():
            states = torch.stack([last[number].states[-1] for number in numbers])
            made = (
                self.runner.compute_logits(states) if depth is None else self.runner.compute_exit_logits(depth, states)
            )
            if len(numbers) == len(chunks):
                return made
            rows.update(zip(numbers, made, strict=True))
        return torch.stack([rows[number] for number in range(len(chunks))])
