"""HTTP routes of the server."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from recursify.checkpoint.vocabulary import require_known_tokens
from recursify.errors import EngineError
from recursify.server.engine_process import EngineSnapshot

from .chat_responses import ChatFormat
from .completion_responses import CompletionFormat, Echo
from .engine_supervisor import EngineSupervisor, ReadyEngine
from .errors import ApiError, api_error, check_limit, error_response, json_response
from .handlers import CompletionJob
from .metrics import CONTENT_TYPE
from .page import CONTENT_SECURITY_POLICY, PAGE
from .schema import ChatRequest, CompletionRequest

router = APIRouter()
CREATED = int(time.time())


async def supervisor_of(http: Request) -> EngineSupervisor:
    """Return the supervisor of the engine."""
    return http.app.state.supervisor


Supervisor = Annotated[EngineSupervisor, Depends(supervisor_of)]


@router.post("/v1/completions", summary="Create a completion")
async def completions(body: CompletionRequest, http: Request, supervisor: Supervisor) -> Response:
    """OpenAI's completions; `exit` selects early exit."""
    supervisor.check_model(body.model)
    engine = supervisor.ready()
    special = body.add_special_tokens is not False
    prompts = await engine.prompts.encode_completion(body.prompt, add_special_tokens=special)
    check_limit("prompt", len(prompts), supervisor.settings.max_prompts, "prompts")
    build = engine.sampling.build
    completions = [(prompt, params) for prompt in prompts for params in build(body, len(prompt), body.logprobs)]
    echoes = await _echoes(supervisor, engine, body, prompts) if body.echo else []
    skip = body.skip_special_tokens is not False
    form = CompletionFormat(supervisor.model_name, engine.prompts.tokenizer, echoes, skip_special_tokens=skip)
    return await CompletionJob(supervisor, "completions", body, completions, form).respond(http)


@router.post("/v1/chat/completions", summary="Create a chat completion")
async def chat_completions(body: ChatRequest, http: Request, supervisor: Supervisor) -> Response:
    """OpenAI's chat completions, with the model's own chat template; `exit` selects early exit."""
    supervisor.check_model(body.model)
    engine = supervisor.ready()
    prompt = await engine.prompts.encode_chat(body)
    count = body.top_logprobs or 0
    params = engine.sampling.build(body, len(prompt), count if body.logprobs else None)
    form = ChatFormat(supervisor.model_name, engine.prompts.tokenizer, count, stream=bool(body.stream))
    return await CompletionJob(supervisor, "chat", body, [(prompt, entry) for entry in params], form).respond(http)


@router.get("/v1/models", summary="List the models")
async def models(supervisor: Supervisor) -> Response:
    """The one model of this server."""
    return json_response({"object": "list", "data": [_model(supervisor)]})


@router.get("/v1/models/{name:path}", summary="Get a model")
async def model(name: str, supervisor: Supervisor) -> Response:
    """The model of that name."""
    supervisor.check_model(name)
    return json_response(_model(supervisor))


@router.get("/health", summary="Check whether the server is ready")
async def health(supervisor: Supervisor) -> Response:
    """200 if the server takes requests, else 503 with the reason."""
    state, reason, model = supervisor.state, supervisor.reason, supervisor.model_name
    report = {"status": state, "reason": reason, "model": model, "num_recursions": supervisor.num_recursions}
    return json_response(report, 200 if state == "ready" else 503)


@router.get("/metrics", summary="Get metrics in Prometheus' format")
async def metrics(supervisor: Supervisor) -> Response:
    """Metrics of the server and its engine."""
    try:
        snapshot: EngineSnapshot | None = await supervisor.snapshot(5.0)
    except ApiError:  # no engine, or one in a long iteration: the other metrics are still valid
        snapshot = None
    return Response(supervisor.metrics.text(snapshot, ready=supervisor.state == "ready"), media_type=CONTENT_TYPE)


@router.post("/restart", summary="Start a new engine after one has stopped")
async def restart(supervisor: Supervisor) -> Response:
    """409 while an engine runs."""
    if supervisor.state != "stopped":
        message = f"No engine has stopped. {supervisor.reason}"
        raise ApiError(409, message, code=f"engine_{supervisor.state}")
    if not await supervisor.load():
        raise supervisor.unavailable()
    return json_response({"status": supervisor.state})


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The chat page."""
    return HTMLResponse(PAGE, headers={"content-security-policy": CONTENT_SECURITY_POLICY})


def _add_head_routes() -> None:
    """Let HEAD be answered like GET; the HTTP server leaves the body out."""
    for route in list(router.routes):
        if isinstance(route, APIRoute) and route.methods == {"GET"}:
            router.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)


_add_head_routes()


async def answer_other_methods(http: Request, error: Exception) -> Response:
    """Answer a request of a method that its path does not have: OPTIONS with the methods, others with an error."""
    routes = [route for route in router.routes if isinstance(route, APIRoute)]
    methods = {"OPTIONS"}.union(*(route.methods or () for route in routes if route.path_regex.match(http.url.path)))
    headers = {"allow": ", ".join(sorted(methods))}
    if http.method == "OPTIONS":
        return Response(status_code=204, headers=headers)
    return error_response(replace(api_error(error), headers=headers))


def _model(supervisor: EngineSupervisor) -> dict[str, Any]:
    return {"id": supervisor.model_name, "object": "model", "created": CREATED, "owned_by": "recursify"}


async def _echoes(
    supervisor: EngineSupervisor, engine: ReadyEngine, body: CompletionRequest, prompts: list[list[int]]
) -> list[Echo]:
    """Return the prompt to repeat for each completion, with log-probabilities if requested."""
    echoes: list[Echo] = []
    for ids in prompts:  # an echo may be computed before the engine checks the request
        vocab_size = engine.client.info.config.vocab_size
        require_known_tokens(ids, vocab_size, engine.prompts.tokenizer, error=EngineError)
    for ids in prompts:
        logprobs = None if body.logprobs is None else await supervisor.score(ids, body.logprobs)
        text = engine.prompts.decode(ids, skip_special_tokens=body.skip_special_tokens is not False)
        echoes += [Echo(text, ids, logprobs)] * (body.n or 1)
    return echoes
