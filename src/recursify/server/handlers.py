"""One request from its prompts to its answer, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from recursify.engine import SamplingParams
from recursify.errors import EngineError, SettingsError

from .access_log import log_event, note, request_id_of
from .engine_supervisor import EngineSupervisor
from .errors import ApiError, json_response, refused, unexpected
from .response_stream import ResponseStream
from .responses import Format, joined, usage_of
from .schema import AnswerRequest
from .sse import DONE, ClientDisconnected, EventStreamResponse, event, until_gone


@dataclass(frozen=True)
class CompletionJob:
    """What a request comes to.

    Attributes:
        endpoint: For the counts.
        request: What was asked.
        prompts: As token ids.
        params: Per prompt, one set per choice.
        form: How the answer is written.
    """

    endpoint: str
    request: AnswerRequest
    prompts: list[list[int]]
    params: list[list[SamplingParams]]
    form: Format


async def answer(host: EngineSupervisor, http: Request, work: CompletionJob) -> Response:
    """The response to ``work``, once the engine has taken it."""
    tally = RequestMetrics(host, work.endpoint)
    if not work.request.stream:
        try:
            with tally.counted():
                return json_response(await until_gone(http.receive, _whole(host, work, tally)))
        except ClientDisconnected:
            return Response(status_code=499)
    # Up to the first event a refusal can still have a status of its own.
    events = _events(host, work, tally, request_id_of(http.scope))
    try:
        first = await until_gone(http.receive, anext(events))
    except ClientDisconnected:
        return Response(status_code=499)
    return EventStreamResponse(first, events, host.settings.write_seconds)


async def _whole(host: EngineSupervisor, work: CompletionJob, tally: RequestMetrics) -> dict[str, Any]:
    async with host.answers(work.prompts, work.params) as answers:
        async for chunks in answers.chunks():
            tally.saw(bool(chunks))
        usage = _usage(host, work, answers)
        return work.form.whole(await answers.whole()) | {"usage": usage}


async def _events(
    host: EngineSupervisor, work: CompletionJob, tally: RequestMetrics, request_id: str
) -> AsyncGenerator[bytes, None]:
    """The events of a stream, the first of them when the engine has taken the request.

    Raises:
        ApiError, EngineError: It was refused. What goes wrong later is an event.
    """
    wants_usage = work.request.stream_options is not None and work.request.stream_options.include_usage
    with tally.counted():
        async with host.answers(work.prompts, work.params) as answers:
            yield b": accepted\n\n"
            try:
                for choice in work.form.opening(sum(map(len, work.params))):
                    yield event(work.form.with_choices([choice]))
                async for chunks in answers.chunks():
                    tally.saw(any(chunk.token_ids for _, chunk in chunks))
                    yield b"".join(event(work.form.with_choices([work.form.event(said)])) for said in joined(chunks))
                usage = _usage(host, work, answers)
                if wants_usage:
                    yield event(work.form.with_choices([], usage))
            except ApiError as error:
                tally.outcome = error.code or "error"
                yield event(error.body)
            except Exception as error:
                tally.outcome = "error"
                log_event("error", "a stream failed", id=request_id, exception=error)
                yield event(unexpected(request_id).body)
            yield DONE


def _usage(host: EngineSupervisor, work: CompletionJob, answers: ResponseStream) -> dict[str, Any]:
    outputs = [answers.outputs[index] for index in sorted(answers.outputs)]
    usage = usage_of(outputs, len(work.params[0]), host.num_recursions)
    note(
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        mean_depth=usage["mean_depth"],
        finish_reasons=sorted({str(output.finish_reason) for output in outputs}),
    )
    return usage


class RequestMetrics:
    """Counts one request: its outcome, and its times.

    Args:
        host: Whose counts they are.
        endpoint: That was asked.
    """

    def __init__(self, host: EngineSupervisor, endpoint: str) -> None:
        self._metrics, self._endpoint = host.metrics, endpoint
        self._started, self._saw = time.perf_counter(), False
        self.outcome = "answered"

    def saw(self, has_tokens: bool) -> None:
        """Tokens have come."""
        if has_tokens and not self._saw:
            self._saw = True
            seconds = time.perf_counter() - self._started
            self._metrics.first_token.observe(seconds)
            note(first_token_seconds=round(seconds, 4))

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Around the request."""
        try:
            yield
        except (EngineError, SettingsError) as error:
            self.outcome = refused(error).code or "refused"
            raise
        except ApiError as error:
            self.outcome = error.code or "refused"
            raise
        except BaseException:
            self.outcome = "abandoned"
            raise
        finally:
            self._metrics.requests.labels(self._endpoint, self.outcome).inc()
            self._metrics.whole.observe(time.perf_counter() - self._started)
