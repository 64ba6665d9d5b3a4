"""The engine behind a server: loaded once it serves, replaced when it has failed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from recursify.engine import Engine, EngineThread, SamplingParams
from recursify.errors import EngineError, RecursifyError

from .admission import Admission
from .answers import Answers, Inbox
from .errors import ApiError
from .metrics import Metrics
from .prompts import Prompts
from .request_log import log_event
from .sampling import Sampling
from .settings import ServerSettings

State = Literal["loading", "ready", "stopped", "closing"]
T = TypeVar("T")


@dataclass(frozen=True)
class Serving:
    """What there is while an engine runs."""

    thread: EngineThread
    prompts: Prompts
    sampling: Sampling
    num_recursions: int


class EngineHost:
    """Makes an engine, hands requests to it, and knows how it is.

    Args:
        build: Makes the engine, with its tokenizer; called in another thread, and again for a restart.
        settings: Of the server.
    """

    def __init__(self, build: Callable[[], Engine], settings: ServerSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.admission = Admission(1, settings.max_queue)
        self.load_error: BaseException | None = None
        self.has_loaded = False
        self._build = build
        self._serving: Serving | None = None
        self._loading = asyncio.Lock()
        self._closing = False
        self._answers: set[Answers] = set()
        self._inbox: Inbox | None = None
        self._logged: BaseException | None = None

    # --- How it is -----------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Whether requests can be taken, and why not."""
        if self._closing:
            return "closing"
        if self._serving is None:
            return "stopped" if self.load_error is not None else "loading"
        return "ready" if self._serving.thread.is_running else "stopped"

    @property
    def reason(self) -> str:
        """Why the state is what it is; of an error only its kind, since its text may name what is inside."""
        error = self.load_error if self._serving is None else self._serving.thread.error
        kind = type(error).__name__
        return {
            "loading": "The model is being loaded.",
            "ready": "Requests are answered.",
            "stopped": f"The engine has stopped ({kind}). The server's log says why; POST /restart makes a new one.",
            "closing": "The server is shutting down.",
        }[self.state]

    @property
    def num_recursions(self) -> int:
        """Of the model; 0 while there is none."""
        return 0 if self._serving is None else self._serving.num_recursions

    def ready(self) -> Serving:
        """What a request needs.

        Raises:
            ApiError: No engine runs.
        """
        if self.state != "ready" or self._serving is None:
            raise ApiError(503, self.reason, code=f"engine_{self.state}", headers={"retry-after": "5"})
        return self._serving

    async def ask_engine(self, function: Callable[[Engine], T], seconds: float) -> T:
        """What ``function`` finds between two iterations of the engine.

        Raises:
            ApiError: No engine runs, or it did not come to it in time.
        """
        try:
            found = asyncio.wrap_future(self.ready().thread.call(function))
            return await asyncio.wait_for(found, seconds)
        except TimeoutError:
            raise ApiError(504, f"The engine did not come to it within {seconds:g} seconds. Try again.") from None
        except EngineError:
            raise ApiError(503, self.reason, code=f"engine_{self.state}") from None

    # --- Requests ------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def answers(self, prompts: list[list[int]], params: list[list[SamplingParams]]) -> Any:
        """The answers to ``prompts``, each once per set of its ``params``; whatever happens, they end with the block.

        Raises:
            ApiError: There is no room, or no engine.
            EngineError: One of them was refused; none is answered, then.
        """
        serving = self.ready()
        assert self._inbox is not None
        asked = [(prompt, each) for prompt, its in zip(prompts, params, strict=True) for each in its]
        ticket = self.admission.take(len(asked))
        answers = Answers(self, serving.thread, self._inbox, asked)
        self._answers.add(answers)
        try:
            await answers.accept()
            yield answers
        finally:
            answers.close()
            self._answers.discard(answers)
            ticket.give_back()

    def log_failure(self) -> None:
        """Log why the engine has stopped, once."""
        error = None if self._serving is None else self._serving.thread.error
        if error is not None and error is not self._logged:
            self._logged = error
            log_event("error", "the engine has stopped", exception=error)

    # --- Beginning and end ---------------------------------------------------------------------------------------

    async def load(self) -> bool:
        """Make the engine, unless one runs; whether it was made."""
        async with self._loading:
            if self._closing or (self._serving is not None and self._serving.thread.is_running):
                return False
            await self._let_go()
            self.load_error = None
            self._inbox = Inbox(asyncio.get_running_loop())
            try:
                engine = await asyncio.to_thread(self._make)
            except Exception as error:
                self.load_error = error
                expected = isinstance(error, RecursifyError)
                log_event("error", "the model did not load", message=str(error), exception=None if expected else error)
                return False
            self.admission.running = engine.scheduler.max_requests
            self.admission.capacity = engine.scheduler.max_requests + self.settings.max_queue
            self._serving = self._serve(engine)
            self.has_loaded = True
            log_event("info", "ready", model=self.settings.model_name, pages=engine.pages.pools[0].num_pages)
            return True

    def _make(self) -> Engine:
        """An engine that has answered once, so that what it cannot do shows now."""
        engine = self._build()
        leaves = self._sampling(engine).leaving(self.settings.default_exit)
        engine.generate([[0]], SamplingParams(max_tokens=1, **leaves))
        engine.reset_stats()
        return engine

    def _sampling(self, engine: Engine) -> Sampling:
        return Sampling(self.settings, engine.parts.config, engine.kv, engine.max_length)

    def _serve(self, engine: Engine) -> Serving:
        limit = self.settings.max_prompt_tokens
        longest = engine.max_length - 1 if limit is None else min(limit, engine.max_length - 1)
        return Serving(
            EngineThread(engine), Prompts(engine.tokenizer, longest), self._sampling(engine), engine.parts.num_depths
        )

    async def _let_go(self) -> None:
        """Forget the engine that has stopped, with its pages, so that there is room for the next."""
        if self._serving is not None:
            self.metrics.keep(self._serving.thread.engine)
            await asyncio.to_thread(self._serving.thread.close, drain=False, timeout=5.0)
            self._serving.prompts.close()
            self._serving = None

    async def finish(self) -> None:
        """Take no more requests; finish those there are in the time that there is, and tell the others."""
        self._closing = True
        deadline = asyncio.get_running_loop().time() + self.settings.shutdown_seconds
        while self._answers and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        if self._answers:
            log_event("warning", "answers were cut off by the end of the server", requests=len(self._answers))
        for answers in list(self._answers):
            answers.fail(ApiError(503, self.reason, code="engine_closing"))

    async def close(self) -> None:
        """End the engine."""
        self._closing = True
        await self._let_go()
