"""Servers in threads, over a tiny random model whose engine is in a thread, or in a process of its own."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from helpers.schedules import model_of
from helpers.tiny_models import byte_tokenizer
from recursify.engine import Engine
from recursify.server.app import create_app
from recursify.server.engine_supervisor import EngineSupervisor
from recursify.server.settings import ServerSettings
from recursify.server.uvicorn_server import Server, listen

NAME = "tiny"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(*, template: str | None = TEMPLATE) -> Any:
    """Byte tokenizer with a chat template."""
    made = byte_tokenizer()
    made.chat_template = template
    return made


def make_engine(family: str, kv: str, template: str | None, settings: dict[str, Any], seconds: float) -> Engine:
    """Engine of a tiny model with exits or routers; its iterations take at least ``seconds``."""
    # A copy: while an engine runs, it replaces the model's attention, so that no other thread can use the model.
    model = copy.deepcopy(model_of(family, kv))
    engine = Engine(model, tokenizer(template=template), kv=kv, force_kv=True, **settings)
    step = engine.step

    def slow() -> None:
        time.sleep(seconds)
        step()

    if seconds:
        engine.step = slow  # type: ignore[method-assign]
    return engine


def build(family: str = "llama", kv: str = "deferred", *, seconds: float = 0.0, **settings: Any) -> partial[Engine]:
    """Callable that makes such engines, here or in another process."""
    template = settings.pop("template", TEMPLATE)
    chosen = {"max_num_seqs": 8, "num_pages": 256, "page_size": 8, **settings}
    return partial(make_engine, family, kv, template, chosen, seconds)


SLOW = 0.01
"""Seconds per iteration, for requests that must take a while."""


@dataclass
class Running:
    """A server that takes requests.

    Attributes:
        engines: Engines that were made in this process.
    """

    url: str
    supervisor: EngineSupervisor
    server: Server
    thread: threading.Thread
    engines: list[Engine]

    @property
    def client(self) -> openai.OpenAI:
        """OpenAI's client of the server."""
        key = self.supervisor.settings.api_key or "none"
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    @property
    def http(self) -> httpx.Client:
        """HTTP client of the server."""
        return httpx.Client(base_url=self.url, timeout=60)

    def metrics(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """All samples by name and labels."""
        headers = {"authorization": f"Bearer {self.supervisor.settings.api_key}"}
        answer = self.http.get("/metrics", headers=headers)
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        return {
            (sample.name, tuple(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }

    def says(self, name: str) -> float:
        """Value of a metric without labels."""
        return self.metrics()[f"recursify_{name}", ()]

    @property
    def num_requests(self) -> int:
        """Number of requests in the engine."""
        metrics = self.metrics()
        return int(sum(metrics[f"recursify_{name}_requests", ()] for name in ("running", "waiting")))

    def is_idle(self, seconds: float = 20.0) -> bool:
        """Wait until the engine has no request and no page in use; False after ``seconds``."""
        return eventually(lambda: not self.num_requests and not self.says("pages_used"), seconds)

    def stop(self) -> None:
        """Shut down as a signal does."""
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


def eventually(condition: Callable[[], Any], seconds: float = 20.0) -> bool:
    """Wait until ``condition`` is true; False after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


@contextlib.contextmanager
def running(
    builder: Callable[[], Engine] | None = None, *, wait: bool = True, own_process: bool = False, **settings: Any
) -> Iterator[Running]:
    """Run a server until the block ends."""
    builder, engines = builder or build(), []

    def made_here() -> Engine:
        engines.append(builder())
        return engines[-1]

    chosen = ServerSettings(**{"model_name": NAME, **settings})
    listener = listen("127.0.0.1", 0)
    app = create_app(builder if own_process else made_here, chosen, own_process=own_process)
    server = Server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    made = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.supervisor, server, thread, engines)
    try:
        if wait:
            assert eventually(lambda: made.supervisor.state == "ready", 60), made.supervisor.load_error
        yield made
    finally:
        made.stop()
