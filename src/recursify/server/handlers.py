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

from .access_log import add_log_fields, log_event, request_id_of
from .engine_supervisor import EngineSupervisor
from .errors import ApiError, engine_refusal, internal_error, json_response
from .responses import ResponseFormat, merge_chunks, usage_of
from .schema import GenerationRequest
from .sse import DONE, ClientDisconnected, EventStreamResponse, encode_event, run_until_disconnect


@dataclass(frozen=True)
class CompletionJob:
    """The work for one request.

    Attributes:
        endpoint: Name of the endpoint in metrics.
        request: Body of the request.
        prompts: Token ids of each prompt.
        params: Sampling parameters of each completion of each prompt.
        format: Format of the response.
    """

    endpoint: str
    request: GenerationRequest
    prompts: list[list[int]]
    params: list[list[SamplingParams]]
    format: ResponseFormat


async def respond(supervisor: EngineSupervisor, http: Request, job: CompletionJob) -> Response:
    """Run ``job``, and return its response, or the beginning of it once the engine has taken all prompts."""
    metrics = RequestMetrics(supervisor, job.endpoint)
    if not job.request.stream:
        try:
            with metrics.measured():
                return json_response(await run_until_disconnect(http.receive, _response(supervisor, job, metrics)))
        except ClientDisconnected:
            return Response(status_code=499)
    # Until the first event, an error can still have a status of its own.
    events = _events(supervisor, job, metrics, request_id_of(http.scope))
    try:
        first = await run_until_disconnect(http.receive, anext(events))
    except ClientDisconnected:
        return Response(status_code=499)
    return EventStreamResponse(first, events, supervisor.settings.write_timeout)


async def _response(supervisor: EngineSupervisor, job: CompletionJob, metrics: RequestMetrics) -> dict[str, Any]:
    async with supervisor.submit(job.prompts, job.params) as stream:
        async for chunks in stream.chunks():
            metrics.mark_tokens(bool(chunks))
        outputs = stream.finished
        choices = [job.format.finished_choice(index, output) for index, output in enumerate(outputs)]
        return job.format.with_choices(choices, _usage(supervisor, job, outputs))


async def _events(
    supervisor: EngineSupervisor, job: CompletionJob, metrics: RequestMetrics, request_id: str
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream, the first one once the engine has taken all prompts.

    Raises:
        ApiError, EngineError: The request was refused. Later errors are sent as events.
    """
    wants_usage = job.request.stream_options is not None and job.request.stream_options.include_usage
    with metrics.measured():
        async with supervisor.submit(job.prompts, job.params) as stream:
            yield b": accepted\n\n"
            try:
                for choice in job.format.opening(sum(map(len, job.params))):
                    yield encode_event(job.format.with_choices([choice]))
                async for chunks in stream.chunks():
                    metrics.mark_tokens(any(chunk.token_ids for _, chunk in chunks))
                    choices = map(job.format.event_choice, merge_chunks(chunks))
                    yield b"".join(encode_event(job.format.with_choices([choice])) for choice in choices)
                usage = _usage(supervisor, job, stream.finished)
                if wants_usage:
                    yield encode_event(job.format.with_choices([], usage))
            except ApiError as error:
                metrics.outcome = error.code or "error"
                yield encode_event(error.body)
            except Exception as error:
                metrics.outcome = "error"
                log_event("error", "a stream failed", id=request_id, exception=error)
                yield encode_event(internal_error(request_id).body)
            yield DONE


def _usage(supervisor: EngineSupervisor, job: CompletionJob, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    usage = usage_of(outputs, len(job.params[0]), supervisor.num_recursions)
    add_log_fields(
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        mean_depth=usage["mean_depth"],
        finish_reasons=sorted({str(output.finish_reason) for output in outputs}),
    )
    return usage


class RequestMetrics:
    """Outcome and times of one request.

    Args:
        supervisor: Supervisor whose metrics are updated.
        endpoint: Name of the endpoint.
    """

    def __init__(self, supervisor: EngineSupervisor, endpoint: str) -> None:
        self._metrics, self._endpoint = supervisor.metrics, endpoint
        self._started, self._has_tokens = time.perf_counter(), False
        self.outcome = "answered"

    def mark_tokens(self, has_tokens: bool) -> None:
        """Record the time to the first token, if ``has_tokens`` for the first time."""
        if has_tokens and not self._has_tokens:
            self._has_tokens = True
            seconds = time.perf_counter() - self._started
            self._metrics.first_token.observe(seconds)
            add_log_fields(first_token_seconds=round(seconds, 4))

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Record the outcome and the duration of the block."""
        try:
            yield
        except (EngineError, SettingsError) as error:
            self.outcome = engine_refusal(error).code or "refused"
            raise
        except ApiError as error:
            self.outcome = error.code or "refused"
            raise
        except BaseException:
            self.outcome = "abandoned"
            raise
        finally:
            self._metrics.requests.labels(self._endpoint, self.outcome).inc()
            self._metrics.duration.observe(time.perf_counter() - self._started)
