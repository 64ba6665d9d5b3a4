"""HTTP routes of the server."""

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
from .handlers import CompletionJob, respond
from .metrics import CONTENT_TYPE
from .page import CONTENT_SECURITY_POLICY, PAGE
from .schema import ChatRequest, CompletionRequest

router = APIRouter()
CREATED = int(time.time())


def supervisor_of(http: Request) -> EngineSupervisor:
    """Return the supervisor of the engine."""
    return http.app.state.supervisor


def ready_engine(http: Request, model: str | None) -> tuple[EngineSupervisor, ReadyEngine]:
    """Return the supervisor and the engine, for a request to ``model``.

    Raises:
        ApiError: No engine runs, or its model has another name.
    """
    supervisor = supervisor_of(http)
    if model is not None:
        _check_model(supervisor, model)
    return supervisor, supervisor.ready()


@router.post("/v1/completions", summary="Create a completion")
async def completions(body: CompletionRequest, http: Request) -> Response:
    """OpenAI's completions; `exit` selects early exit."""
    supervisor, engine = ready_engine(http, body.model)
    prompts = await engine.prompts.encode_completion(body.prompt)
    if len(prompts) > supervisor.settings.max_prompts:
        message = f"prompt: At most {supervisor.settings.max_prompts} prompts are allowed, got {len(prompts)}."
        raise ApiError(400, message, param="prompt", code="limit_exceeded")
    params = [engine.sampling.build(body, len(prompt), body.logprobs) for prompt in prompts]
    echoes = await _echoes(supervisor, engine, body, prompts) if body.echo else []
    form = CompletionFormat(supervisor.model_name, engine.prompts.tokenizer, echoes)
    return await respond(supervisor, http, CompletionJob("completions", body, prompts, params, form))


@router.post("/v1/chat/completions", summary="Create a chat completion")
async def chat_completions(body: ChatRequest, http: Request) -> Response:
    """OpenAI's chat completions, with the model's own chat template; `exit` selects early exit."""
    supervisor, engine = ready_engine(http, body.model)
    prompt = await engine.prompts.encode_chat(body.messages)
    count = body.top_logprobs or 0
    params = engine.sampling.build(body, len(prompt), count if body.logprobs else None)
    form = ChatFormat(supervisor.model_name, engine.prompts.tokenizer, count, stream=bool(body.stream))
    return await respond(supervisor, http, CompletionJob("chat", body, [prompt], [params], form))


@router.get("/v1/models", summary="List the models")
async def models(http: Request) -> Response:
    """The one model of this server."""
    return json_response({"object": "list", "data": [_model(supervisor_of(http))]})


@router.get("/v1/models/{name:path}", summary="Get a model")
async def model(name: str, http: Request) -> Response:
    """The model of that name."""
    supervisor = supervisor_of(http)
    _check_model(supervisor, name)
    return json_response(_model(supervisor))


@router.get("/health", summary="Check whether the server is ready")
async def health(http: Request) -> Response:
    """200 if the server takes requests, else 503 with the reason."""
    supervisor = supervisor_of(http)
    state = supervisor.state
    report = {
        "status": state,
        "reason": supervisor.reason,
        "model": supervisor.model_name,
        "num_recursions": supervisor.num_recursions,
    }
    return json_response(report, 200 if state == "ready" else 503)


@router.get("/metrics", summary="Get metrics in Prometheus' format")
async def metrics(http: Request) -> Response:
    """Metrics of the server and its engine."""
    supervisor = supervisor_of(http)
    try:
        snapshot: EngineSnapshot | None = await supervisor.snapshot(5.0)
    except ApiError:  # no engine, or one in a long iteration: the other metrics are still valid
        snapshot = None
    return Response(supervisor.metrics.text(snapshot, ready=supervisor.state == "ready"), media_type=CONTENT_TYPE)


@router.post("/restart", summary="Start a new engine after one has stopped")
async def restart(http: Request) -> Response:
    """409 while an engine runs."""
    supervisor = supervisor_of(http)
    if supervisor.state in ("ready", "loading", "closing"):
        message = f"No engine has stopped. {supervisor.reason}"
        raise ApiError(409, message, code=f"engine_{supervisor.state}")
    if not await supervisor.load():
        raise ApiError(503, supervisor.reason, code=f"engine_{supervisor.state}")
    return json_response({"status": supervisor.state})


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The chat page."""
    return HTMLResponse(PAGE, headers={"content-security-policy": CONTENT_SECURITY_POLICY})


def _check_model(supervisor: EngineSupervisor, name: str) -> None:
    """Raise an ApiError unless ``name`` is the model's."""
    if name != supervisor.model_name:
        message = f"Model not found. This server serves '{supervisor.model_name}'. Use that name."
        raise ApiError(404, message, param="model", code="model_not_found")


def _model(supervisor: EngineSupervisor) -> dict[str, Any]:
    return {"id": supervisor.model_name, "object": "model", "created": CREATED, "owned_by": "recursify"}


async def _echoes(
    supervisor: EngineSupervisor, engine: ReadyEngine, body: CompletionRequest, prompts: list[list[int]]
) -> list[Echo]:
    """Return the prompt to repeat for each completion, with log-probabilities if requested."""
    echoes: list[Echo] = []
    for ids in prompts:
        logprobs = None
        if body.logprobs is not None:
            logprobs = await supervisor.score(ids, body.logprobs)
        echoes += [Echo(engine.prompts.decode(ids), ids, logprobs)] * (body.n or 1)
    return echoes
