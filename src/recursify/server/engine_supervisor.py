"""Life of the engine behind a server: loads it at start-up, watches it, and replaces it after a failure."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from recursify.engine import Engine, SamplingParams
from recursify.errors import EngineError, RecursifyError
from recursify.server.engine_process import EngineClient, EngineSnapshot

from .access_log import log_event
from .admission import Admission
from .errors import ApiError
from .metrics import Metrics
from .prompts import PromptEncoder
from .response_stream import ResponseStream
from .sampling import SamplingParamsBuilder, check_exit_policy
from .settings import ServerSettings

State = Literal["loading", "ready", "stopped", "closing"]
T = TypeVar("T")


@dataclass(frozen=True)
class ReadyEngine:
    """Client of an engine that takes requests, and the parts that make requests for it."""

    client: EngineClient
    prompts: PromptEncoder
    sampling: SamplingParamsBuilder


class EngineSupervisor:
    """Loads an engine, submits requests to it, and reports its state; see :func:`~recursify.server.app.create_app`."""

    def __init__(self, build: Callable[[], Engine], settings: ServerSettings, *, own_process: bool) -> None:
        check_exit_policy(settings.exit_policy)
        self.settings, self.model_name = settings, settings.model_name or "model"
        self.metrics, self.admission = Metrics(), Admission(1, settings.max_queue)
        self.load_error: BaseException | None = None
        self.has_loaded = False
        self._build, self._own_process = build, own_process
        self._engine: ReadyEngine | None = None
        self._loading, self._closing = asyncio.Lock(), False
        self._streams: set[ResponseStream] = set()

    @property
    def state(self) -> State:
        """State of the engine; requests are taken in state ``ready``."""
        if self._closing:
            return "closing"
        if self._engine is None:
            return "stopped" if self.load_error is not None else "loading"
        return "ready" if self._engine.client.is_running else "stopped"

    @property
    def reason(self) -> str:
        """Reason for the state, with only the kind of an error, since its text may contain internal details."""
        error = self.load_error if self._engine is None else self._engine.client.error
        kind = getattr(error, "kind", type(error).__name__)
        return {
            "loading": "The model is loading.",
            "ready": "The server is ready.",
            "stopped": f"The engine has stopped ({kind}). See the server's log, and POST /restart to start a new one.",
            "closing": "The server is shutting down.",
        }[self.state]

    @property
    def num_recursions(self) -> int:
        """Number of recursions of the model; 0 while none is loaded."""
        return 0 if self._engine is None else self._engine.client.info.num_recursions

    def check_model(self, name: str | None) -> None:
        """Raise an ApiError for a request to a model of another name."""
        if name not in (None, self.model_name):
            message = f"Model not found. This server serves '{self.model_name}'. Use that name."
            raise ApiError(404, message, param="model", code="model_not_found")

    def ready(self) -> ReadyEngine:
        """Return the engine; raise an ApiError if none runs."""
        if self.state != "ready" or self._engine is None:
            raise self.unavailable()
        return self._engine

    def unavailable(self) -> ApiError:
        """Make the error for requests while no engine runs."""
        return ApiError(503, self.reason, code=f"engine_{self.state}", headers={"retry-after": "5"})

    async def snapshot(self, timeout: float) -> EngineSnapshot:
        """Read the engine's counts; raise an ApiError if none runs, or it does not respond in time."""
        return await self._call(self.ready().client.snapshot(), timeout)

    async def score(self, ids: list[int], count: int) -> list[dict[int, float] | None]:
        """Call :func:`~recursify.server.engine_process.scoring.score_prompt`, with the errors of :meth:`snapshot`."""
        return await self._call(self.ready().client.score(ids, count), self.settings.request_timeout)

    async def _call(self, call: Coroutine[Any, Any, T], timeout: float) -> T:
        try:
            return await asyncio.wait_for(call, timeout)
        except TimeoutError:
            raise ApiError(504, f"The engine did not respond within {timeout:g} seconds. Try again.") from None
        except EngineError:
            raise self.unavailable() from None

    @contextlib.asynccontextmanager
    async def submit(self, requests: Sequence[tuple[list[int], SamplingParams]]) -> AsyncIterator[ResponseStream]:
        """Generate completions of prompts with sampling parameters; they are cancelled with the block.

        Raises:
            ApiError: The queue is full, or no engine runs.
            EngineError: The engine has refused one request; all are cancelled.
        """
        engine = self.ready()
        with self.admission.admit(len(requests)):
            stream = ResponseStream(engine.client, requests, self.settings.request_timeout, self.unavailable)
            self._streams.add(stream)
            try:
                await stream.submit()
                yield stream
            finally:
                stream.close()
                self._streams.discard(stream)

    async def load(self) -> bool:
        """Start the engine unless one runs, and return whether it was started."""
        async with self._loading:
            if self._closing or (self._engine is not None and self._engine.client.is_running):
                return False
            await self._close_engine()
            self.load_error = None
            try:
                client = await EngineClient.open(self._build, own_process=self._own_process, on_stop=self._log_stop)
                try:
                    self._engine = await self._warm_up(client)
                except BaseException:
                    await client.close()
                    raise
            except Exception as error:
                self.load_error = error
                expected = isinstance(error, RecursifyError)
                log_event("error", "the model did not load", message=str(error), exception=None if expected else error)
                return False
            info = client.info
            self.admission = Admission(info.max_num_seqs, self.settings.max_queue)
            self.has_loaded = True
            log_event("info", "ready", model=self.model_name, pages=info.num_pages, engine_pid=client.pid)
            return True

    async def _warm_up(self, client: EngineClient) -> ReadyEngine:
        """Generate one token with the default settings, so that an engine that cannot do so fails now."""
        info, limit = client.info, self.settings.max_prompt_tokens
        sampling = SamplingParamsBuilder(self.settings, info)
        params = SamplingParams(max_tokens=1, **sampling.exit_parameters(sampling.default_exit))
        async for _ in client.stream([0], params):
            pass
        await client.reset_stats()
        longest = info.max_model_len - 1 if limit is None else min(limit, info.max_model_len - 1)
        return ReadyEngine(client, PromptEncoder(info.tokenizer, longest), sampling)

    def _log_stop(self, error: Exception) -> None:
        """Log the reason for the engine's stop, which clients do not get, and keep the engine's counts."""
        if self._engine is not None:
            log_event("error", "the engine has stopped", message=str(error), exception=error)
            self.metrics.keep(self._engine.client.last_snapshot)

    async def _close_engine(self) -> None:
        """Close the engine and free its weights and pages, so that there is memory for the next."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.prompts.close()
            await engine.client.close()

    async def finish(self) -> None:
        """Refuse new requests, wait for the running ones, and fail those that have not ended in time."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.shutdown_timeout):
                while self._streams:
                    await asyncio.sleep(0.02)
        if self._streams:
            log_event("warning", "requests were ended by the shutdown", requests=len(self._streams))
        for stream in list(self._streams):
            stream.fail(ApiError(503, self.reason, code="engine_closing"))

    async def close(self) -> None:
        """End the engine."""
        self._closing = True
        await self._close_engine()
