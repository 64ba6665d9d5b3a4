"""What is said by tokens that have left: the coda, and logits.

Shape legend: n tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .flight import Departure, Flight
from .rows import Run
from .runner import Runner


class Readout:
    """The end of the model, for flights all of whose tokens have left."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        parts = runner.parts
        self.last_depth = parts.num_depths - 1
        self.exits_run_coda, self.exits_read_alike = parts.exits_run_coda, parts.exits_read_alike

    def run_coda(self, flights: Sequence[Flight]) -> None:
        """Replace the states of departures by what the coda makes of them, where they run it."""
        running: list[tuple[Flight, Departure]] = []
        for flight in flights:
            for departure in flight.departures:
                if departure.depth < self.last_depth and not self.exits_run_coda:
                    continue
                if flight.exit_states is not None and len(departure.positions) == 1:
                    departure.states = flight.exit_states[None]  # its exit test has run it
                    continue
                running.append((flight, departure))
        if not running or not self.runner.parts.coda:
            return
        runs = [Run(flight.request, None, departure.positions) for flight, departure in running]
        states = self.runner.coda(runs, torch.cat([departure.states for _, departure in running]))
        sizes = [len(run.positions) for run in runs]
        for (_, departure), made in zip(running, states.split(sizes), strict=True):
            departure.states = made

    def logits(self, flights: Sequence[Flight]) -> Tensor:
        """``[n, V]`` of the last token of each."""
        last = [flight.last_departure() for flight in flights]
        by_head: dict[int | None, list[int]] = {}
        rows: dict[int, Tensor] = {}
        for number, (flight, departure) in enumerate(zip(flights, last, strict=True)):
            if flight.exit_logits is not None:
                rows[number] = flight.exit_logits
                continue
            alike = self.exits_read_alike or departure.depth == self.last_depth
            by_head.setdefault(None if alike else departure.depth, []).append(number)
        for depth, numbers in by_head.items():
            states = torch.stack([last[number].states[-1] for number in numbers])
            made = self.runner.read_out(states) if depth is None else self.runner.read_exit(depth, states)
            if len(numbers) == len(flights):
                return made
            rows.update(zip(numbers, made, strict=True))
        return torch.stack([rows[number] for number in range(len(flights))])
