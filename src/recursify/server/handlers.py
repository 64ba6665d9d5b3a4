"""Handling of one generation request: submit its prompts, and send the response whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from recursify.engine import RequestOutput, SamplingParams
from recursify.errors import EngineError, SettingsError

from .access_log import add_log_fields, log_event, request_id
from .engine_supervisor import EngineSupervisor
from .errors import ApiError, api_error, internal_error, json_response
from .metrics import Metrics
from .response_stream import Chunks
from .responses import ResponseFormat, usage_of
from .schema import GenerationRequest
from .sse import DONE, ClientDisconnected, EventStreamResponse, encode_event, run_until_disconnect


class RequestMetrics:
    """Outcome and times of one request to ``endpoint``."""

    def __init__(self, metrics: Metrics, endpoint: str) -> None:
        self._metrics, self._endpoint = metrics, endpoint
        self._started, self._has_tokens = time.perf_counter(), False
        self.outcome = "answered"

    def mark_tokens(self, chunks: Chunks) -> None:
        """Record the time to the first token, if ``chunks`` has it."""
        if not self._has_tokens and any(chunk.token_ids for parts in chunks.values() for chunk in parts):
            self._has_tokens = True
            seconds = time.perf_counter() - self._started
            self._metrics.first_token.observe(seconds)
            add_log_fields(first_token_seconds=round(seconds, 4))

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Record the outcome and the duration of the block."""
        try:
            yield
        except (ApiError, EngineError, SettingsError) as error:
            self.outcome = api_error(error).code or "refused"
            raise
        except BaseException:
            self.outcome = "abandoned"
            raise
        finally:
            self._metrics.requests.labels(self._endpoint, self.outcome).inc()
            self._metrics.duration.observe(time.perf_counter() - self._started)


@dataclass
class CompletionJob:
    """The work for one request: completions of prompts (token ids), each with its sampling parameters."""

    supervisor: EngineSupervisor
    endpoint: str
    request: GenerationRequest
    completions: list[tuple[list[int], SamplingParams]]
    format: ResponseFormat

    async def respond(self, http: Request) -> Response:
        """Return the response, or the beginning of a stream once the engine has taken all prompts."""
        metrics = RequestMetrics(self.supervisor.metrics, self.endpoint)
        try:
            if not self.request.stream:
                with metrics.measured():
                    return json_response(await run_until_disconnect(http.receive, self._response(metrics)))
            # Until the first event, an error can still have a status of its own.
            events = self._events(metrics)
            first = await run_until_disconnect(http.receive, anext(events))
            return EventStreamResponse(first, events, self.supervisor.settings.write_timeout)
        except ClientDisconnected:
            return Response(status_code=499)

    async def _response(self, metrics: RequestMetrics) -> dict[str, Any]:
        async with self.supervisor.submit(self.completions) as stream:
            async for chunks in stream.chunks():
                metrics.mark_tokens(chunks)
            outputs = stream.finished
            choices = [self.format.finished_choice(index, output) for index, output in enumerate(outputs)]
            return self.format.with_choices(choices, self._usage(outputs))

    async def _events(self, metrics: RequestMetrics) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream; errors after the first event, when the engine has all prompts, are events."""
        options, with_choices = self.request.stream_options, self.format.with_choices
        with metrics.measured():
            async with self.supervisor.submit(self.completions) as stream:
                yield b": accepted\n\n"
                try:
                    for choice in self.format.opening(len(self.completions)):
                        yield encode_event(with_choices([choice]))
                    async for chunks in stream.chunks():
                        metrics.mark_tokens(chunks)
                        choices = [self.format.event_choice(index, parts) for index, parts in chunks.items()]
                        yield b"".join(encode_event(with_choices([choice])) for choice in choices)
                    usage = self._usage(stream.finished)
                    if options is not None and options.include_usage:
                        yield encode_event(with_choices([], usage))
                except ApiError as error:
                    metrics.outcome = error.code or "error"
                    yield encode_event(error.body)
                except Exception as error:
                    metrics.outcome = "error"
                    log_event("error", "a stream failed", id=request_id(), exception=error)
                    yield encode_event(internal_error(request_id()).body)
                yield DONE

    def _usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Count the tokens, and log the counts."""
        usage = usage_of(outputs, self.request.n or 1, self.supervisor.num_recursions)
        logged = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "mean_depth")}
        add_log_fields(**logged, finish_reasons=sorted({str(output.finish_reason) for output in outputs}))
        return usage
