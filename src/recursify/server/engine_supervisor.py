"""The engine behind a server: loaded once it serves, replaced when it has failed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from recursify.engine import Engine, SamplingParams
from recursify.errors import EngineError, RecursifyError
from recursify.server.engine_process import Accepted, EngineClient, EngineSnapshot, OutputChunk

from .access_log import log_event
from .admission import Admission
from .errors import ApiError
from .metrics import Metrics
from .prompts import Prompts
from .response_stream import ResponseStream
from .sampling import Sampling
from .settings import ServerSettings

State = Literal["loading", "ready", "stopped", "closing"]
T = TypeVar("T")


@dataclass(frozen=True)
class ReadyEngine:
    """What there is while an engine runs."""

    link: EngineClient
    prompts: Prompts
    sampling: Sampling
    num_recursions: int


class EngineSupervisor:
    """Makes an engine, hands requests to it, and knows how it is.

    Args:
        build: Makes the engine, with its tokenizer; called where the engine runs, and again for a restart.
        settings: Of the server.
        own_process: See :meth:`~recursify.server.engine_process.client.EngineClient.open`.
    """

    def __init__(self, build: Callable[[], Engine], settings: ServerSettings, *, own_process: bool) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.admission = Admission(1, settings.max_queue)
        self.load_error: BaseException | None = None
        self.has_loaded = False
        self._build, self._own_process = build, own_process
        self._serving: ReadyEngine | None = None
        self._loading = asyncio.Lock()
        self._closing = False
        self._answers: set[ResponseStream] = set()

    # --- How it is -----------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Whether requests can be taken, and why not."""
        if self._closing:
            return "closing"
        if self._serving is None:
            return "stopped" if self.load_error is not None else "loading"
        return "ready" if self._serving.link.is_running else "stopped"

    @property
    def reason(self) -> str:
        """Why the state is what it is; of an error only its kind, since its text may name what is inside."""
        error = self.load_error if self._serving is None else self._serving.link.error
        kind = getattr(error, "kind", type(error).__name__)
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

    def ready(self) -> ReadyEngine:
        """What a request needs.

        Raises:
            ApiError: No engine runs.
        """
        if self.state != "ready" or self._serving is None:
            raise self.unavailable()
        return self._serving

    def unavailable(self) -> ApiError:
        """What a caller is told while no engine runs."""
        return ApiError(503, self.reason, code=f"engine_{self.state}", headers={"retry-after": "5"})

    async def snapshot(self, seconds: float) -> EngineSnapshot:
        """The engine's counts.

        Raises:
            ApiError: No engine runs, or it did not come to it in time.
        """
        return await self._in_time(self.ready().link.snapshot(), seconds)

    async def score(self, ids: list[int], count: int) -> list[dict[int, float] | None]:
        """Log-probabilities of a prompt, as :func:`~recursify.server.engine_process.scoring.score_prompt` has them.

        Raises:
            ApiError: No engine runs, or it did not come to it in time.
        """
        return await self._in_time(self.ready().link.score(ids, count), self.settings.request_seconds)

    async def _in_time(self, asking: Coroutine[Any, Any, T], seconds: float) -> T:
        try:
            return await asyncio.wait_for(asking, seconds)
        except TimeoutError:
            raise ApiError(504, f"The engine did not come to it within {seconds:g} seconds. Try again.") from None
        except EngineError:
            raise self.unavailable() from None

    # --- Requests ------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def answers(
        self, prompts: list[list[int]], params: list[list[SamplingParams]]
    ) -> AsyncIterator[ResponseStream]:
        """The answers to ``prompts``, each once per set of its ``params``; whatever happens, they end with the block.

        Raises:
            ApiError: There is no room, or no engine.
            EngineError: One of them was refused; none is answered, then.
        """
        serving = self.ready()
        asked = [(prompt, each) for prompt, its in zip(prompts, params, strict=True) for each in its]
        ticket = self.admission.take(len(asked))
        answers = ResponseStream(self, serving.link, asked)
        self._answers.add(answers)
        try:
            await answers.accept()
            yield answers
        finally:
            answers.close()
            self._answers.discard(answers)
            ticket.give_back()

    # --- Beginning and end ---------------------------------------------------------------------------------------

    async def load(self) -> bool:
        """Make the engine, unless one runs; whether it was made."""
        async with self._loading:
            if self._closing or (self._serving is not None and self._serving.link.is_running):
                return False
            await self._let_go()
            self.load_error = None
            try:
                link = await EngineClient.open(self._build, own_process=self._own_process, on_stop=self._note_stop)
                try:
                    self._serving = await self._try_out(link)
                except BaseException:
                    await link.close()
                    raise
            except Exception as error:
                self.load_error = error
                expected = isinstance(error, RecursifyError)
                log_event("error", "the model did not load", message=str(error), exception=None if expected else error)
                return False
            facts = link.facts
            self.admission.running = facts.max_num_seqs
            self.admission.capacity = facts.max_num_seqs + self.settings.max_queue
            self.has_loaded = True
            log_event("info", "ready", model=self.settings.model_name, pages=facts.num_pages, engine_pid=link.pid)
            return True

    async def _try_out(self, link: EngineClient) -> ReadyEngine:
        """Have the engine answer once, so that what it cannot do shows now.

        Raises:
            EngineError, SettingsError: It cannot do what is asked of every request.
            EngineFailure: It fails at it.
        """
        facts, limit = link.facts, self.settings.max_prompt_tokens
        sampling = Sampling(self.settings, facts.config, facts.kv, facts.max_model_len)
        leaves = sampling.leaving(self.settings.default_exit)
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def listen(what: Accepted | OutputChunk | Exception) -> None:
            if isinstance(what, Exception):
                answered.set_exception(what)
            elif isinstance(what, OutputChunk) and what.finish_reason is not None:
                answered.set_result(None)

        number = link.submit([0], SamplingParams(max_tokens=1, **leaves), listen)
        try:
            await answered
        finally:
            link.cancel(number)
        await link.reset_stats()
        longest = facts.max_model_len - 1 if limit is None else min(limit, facts.max_model_len - 1)
        return ReadyEngine(link, Prompts(facts.tokenizer, longest), sampling, facts.num_recursions)

    def _note_stop(self, error: Exception) -> None:
        """The engine has stopped: say why in the log, where alone the inside is shown, and keep its counts."""
        if self._serving is not None:
            log_event("error", "the engine has stopped", message=str(error), exception=error)
            self.metrics.keep(self._serving.link.last_snapshot)

    async def _let_go(self) -> None:
        """Forget the engine, with its weights and pages, so that there is room for the next."""
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.prompts.close()
            await serving.link.close()

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
