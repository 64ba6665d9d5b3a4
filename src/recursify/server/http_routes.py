"""The addresses of the server."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from recursify.server.engine_process import EngineSnapshot

from .chat_responses import ChatFormat
from .completion_responses import CompletionFormat, Echo
from .engine_supervisor import EngineSupervisor, ReadyEngine
from .errors import ApiError, json_response
from .handlers import CompletionJob, answer
from .metrics import CONTENT_TYPE
from .page import CONTENT_SECURITY_POLICY, PAGE
from .schema import ChatRequest, CompletionRequest

router = APIRouter()
CREATED = int(time.time())


def host_of(http: Request) -> EngineSupervisor:
    """The engine behind the server."""
    return http.app.state.host


def ready(http: Request, model: str | None) -> tuple[EngineSupervisor, ReadyEngine]:
    """The engine, for requests to ``model``.

    Raises:
        ApiError: No engine runs, or its model is another one.
    """
    host = host_of(http)
    name = host.settings.model_name
    if model is not None and model != name:
        message = f"This server has no such model; it has '{name}'. Name that one."
        raise ApiError(404, message, param="model", code="model_not_found")
    return host, host.ready()


@router.post("/v1/completions", summary="Continue texts")
async def completions(body: CompletionRequest, http: Request) -> Response:
    """As OpenAI's; with `exit`, new tokens may leave early."""
    host, serving = ready(http, body.model)
    prompts = await serving.prompts.completions(body.prompt)
    if len(prompts) > host.settings.max_prompts:
        message = f"prompt: At most {host.settings.max_prompts} prompts can be sent at once, got {len(prompts)}."
        raise ApiError(400, message, param="prompt", code="limit_exceeded")
    params = [serving.sampling.for_each_choice(body, len(prompt), body.logprobs) for prompt in prompts]
    echoes = await _echoes(host, serving, body, prompts) if body.echo else []
    form = CompletionFormat(host.settings.model_name, serving.prompts.tokenizer, echoes)
    return await answer(host, http, CompletionJob("completions", body, prompts, params, form))


@router.post("/v1/chat/completions", summary="Go on with a conversation")
async def chat_completions(body: ChatRequest, http: Request) -> Response:
    """As OpenAI's, in the model's own chat template; with `exit`, new tokens may leave early."""
    host, serving = ready(http, body.model)
    prompt = await serving.prompts.chat(body.messages)
    count = body.top_logprobs or 0
    params = serving.sampling.for_each_choice(body, len(prompt), count if body.logprobs else None)
    form = ChatFormat(host.settings.model_name, serving.prompts.tokenizer, count, stream=bool(body.stream))
    return await answer(host, http, CompletionJob("chat", body, [prompt], [params], form))


@router.get("/v1/models", summary="Which model there is")
async def models(http: Request) -> Response:
    """One."""
    return json_response({"object": "list", "data": [_model(host_of(http))]})


@router.get("/v1/models/{name:path}", summary="A model")
async def model(name: str, http: Request) -> Response:
    """By its name."""
    host = host_of(http)
    if name != host.settings.model_name:
        raise ApiError(
            404, f"This server has no such model; it has '{host.settings.model_name}'.", code="model_not_found"
        )
    return json_response(_model(host))


@router.get("/health", summary="Whether requests are answered")
async def health(http: Request) -> Response:
    """200 when they are, 503 with the reason when they are not."""
    host = host_of(http)
    state = host.state
    facts = {"status": state, "reason": host.reason, "model": host.settings.model_name}
    return json_response(facts | {"num_recursions": host.num_recursions}, 200 if state == "ready" else 503)


@router.get("/metrics", summary="Counts, as Prometheus reads them")
async def metrics(http: Request) -> Response:
    """Of the server and its engine."""
    host = host_of(http)
    try:
        snapshot: EngineSnapshot | None = await host.snapshot(5.0)
    except ApiError:  # the engine has stopped, or is in a long iteration: the rest is as true as ever
        snapshot = None
    return Response(host.metrics.text(snapshot, ready=host.state == "ready"), media_type=CONTENT_TYPE)


@router.post("/restart", summary="Make a new engine after one has stopped")
async def restart(http: Request) -> Response:
    """409 while one runs."""
    host = host_of(http)
    if host.state in ("ready", "loading", "closing"):
        raise ApiError(409, f"There is no engine to be replaced. {host.reason}", code=f"engine_{host.state}")
    if not await host.load():
        raise ApiError(503, host.reason, code=f"engine_{host.state}")
    return json_response({"status": host.state})


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """A chat box."""
    return HTMLResponse(PAGE, headers={"content-security-policy": CONTENT_SECURITY_POLICY})


def _model(host: EngineSupervisor) -> dict[str, Any]:
    return {"id": host.settings.model_name, "object": "model", "created": CREATED, "owned_by": "recursify"}


async def _echoes(
    host: EngineSupervisor, serving: ReadyEngine, body: CompletionRequest, prompts: list[list[int]]
) -> list[Echo]:
    """What is repeated before each choice."""
    echoes: list[Echo] = []
    for ids in prompts:
        logged = None
        if body.logprobs is not None:
            logged = await host.score(ids, body.logprobs)
        echoes += [Echo(serving.prompts.text_of(ids), ids, logged)] * (body.n or 1)
    return echoes
