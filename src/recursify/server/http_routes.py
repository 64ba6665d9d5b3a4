"""HTTP routes of the server."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from recursify.server.engine_process import EngineSnapshot

from .chat_responses import ChatFormat
from .completion_responses import CompletionFormat, Echo
from .engine_supervisor import EngineSupervisor, ReadyEngine
from .errors import ApiError, check_limit, json_response
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
    prompts = await engine.prompts.encode_completion(body.prompt)
    check_limit("prompt", len(prompts), supervisor.settings.max_prompts, "prompts")
    build = engine.sampling.build
    completions = [(prompt, params) for prompt in prompts for params in build(body, len(prompt), body.logprobs)]
    echoes = await _echoes(supervisor, engine, body, prompts) if body.echo else []
    form = CompletionFormat(supervisor.model_name, engine.prompts.tokenizer, echoes)
    return await CompletionJob(supervisor, "completions", body, completions, form).respond(http)


@router.post("/v1/chat/completions", summary="Create a chat completion")
async def chat_completions(body: ChatRequest, http: Request, supervisor: Supervisor) -> Response:
    """OpenAI's chat completions, with the model's own chat template; `exit` selects early exit."""
    supervisor.check_model(body.model)
    engine = supervisor.ready()
    prompt = await engine.prompts.encode_chat(body.messages)
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


def _model(supervisor: EngineSupervisor) -> dict[str, Any]:
    return {"id": supervisor.model_name, "object": "model", "created": CREATED, "owned_by": "recursify"}


async def _echoes(
    supervisor: EngineSupervisor, engine: ReadyEngine, body: CompletionRequest, prompts: list[list[int]]
) -> list[Echo]:
    """Return the prompt to repeat for each completion, with log-probabilities if requested."""
    echoes: list[Echo] = []
    for ids in prompts:
        logprobs = None if body.logprobs is None else await supervisor.score(ids, body.logprobs)
        echoes += [Echo(engine.prompts.decode(ids), ids, logprobs)] * (body.n or 1)
    return echoes
