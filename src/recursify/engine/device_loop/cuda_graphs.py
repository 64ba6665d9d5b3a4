"""CUDA graphs: an iteration is captured once, and replayed as often as the host likes, with one launch each time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

logger = logging.getLogger(__name__)


class CudaGraphs:
    """Calls functions whose shapes and addresses do not change; on a GPU through graphs of them.

    Args:
        device: That the functions work on.
        captures: Whether to; where the device is no GPU, functions are called in any case.

    Attributes:
        num_graphs: That were made.
        num_replays: How often one was replayed.
        problem: Why graphs are not used, if they should be.
    """

    def __init__(self, device: torch.device, *, captures: bool = True) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._uses_graphs = captures and device.type == "cuda"
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if self._uses_graphs else None
        self._stream = torch.cuda.Stream(device) if self._uses_graphs else None
        self.num_graphs = self.num_replays = 0
        self.problem: str | None = None

    def run(self, key: Hashable, function: Callable[[], None], times: int) -> None:
        """Call ``function`` so many ``times``.

        Args:
            key: Of the function with its shapes. The first time it is called as it is, which warms up what it uses,
                and captured afterwards.
            function: It must not wait for the device.
            times: One or more.
        """
        graph = self._graphs.get(key)
        if graph is not None:
            for _ in range(times):
                graph.replay()
            self.num_replays += times
            return
        for _ in range(times):
            function()
        if self._uses_graphs and self.problem is None:
            self._capture(key, function)

    def _capture(self, key: Hashable, function: Callable[[], None]) -> None:
        """Nothing is computed here: what the function changes is as it was."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context brings the stream back where the inner one fails to, as torch's does in an error. Other
            # threads may use the device meanwhile: a server's.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                function()
        except RuntimeError as error:
            # Ending a capture that has failed is an error of its own; the first one says why.
            self.problem = str(error.__context__ or error).splitlines()[0]
            logger.warning("Iterations cannot be captured in CUDA graphs, and run without: %s", self.problem)
            return
        self._graphs[key] = graph
        self.num_graphs += 1
