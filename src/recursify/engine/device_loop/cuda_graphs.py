"""CUDA graphs: each part of an iteration is captured once and replayed with one launch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

logger = logging.getLogger(__name__)


class CudaGraphs:
    """Runs functions with static shapes and addresses, on a GPU by replaying CUDA graphs if it ``captures`` them.

    Attributes:
        num_graphs, num_replays: Numbers of captured graphs and of replays.
        problem: Reason why capturing failed, if it did.
    """

    def __init__(self, device: torch.device, *, captures: bool = True) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._device, self._uses_graphs = device, captures and device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._uses_graphs else None
        self._stream = torch.cuda.Stream(device) if self._uses_graphs else None
        self.num_graphs = self.num_replays = 0
        self.problem: str | None = None

    def run(self, key: Hashable, function: Callable[[], None], times: int) -> None:
        """Run ``function``, which does not synchronize with the device, ``times`` times.

        The first run with a ``key``, which identifies the function and its shapes, is eager: it warms up kernels, and
        the graph is captured after it.
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
        """Capture ``function``, which executes nothing: tensors keep their contents."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context restores the stream where the inner one fails to, as torch's does after an error.
            # "thread_local": other threads, such as a server's, may use the device meanwhile.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                function()
        except RuntimeError as error:
            # Ending a failed capture raises an error of its own, whose context is the original error.
            self.problem = str(error.__context__ or error).splitlines()[0]
            logger.warning("CUDA graph capture failed; iterations run without graphs: %s", self.problem)
            return
        self._graphs[key] = graph
        self.num_graphs += 1
