"""Servers on this machine, in threads, over a tiny random model."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from schedules import model_of

from recursify.engine import Engine
from recursify.server import ServerSettings, create_app
from recursify.server.host import EngineHost
from recursify.server.serving import Server, config_of, listen
from tiny_models import byte_tokenizer

NAME = "tiny"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(*, template: str | None = TEMPLATE) -> Any:
    """Of bytes, with a chat template."""
    made = byte_tokenizer()
    made.chat_template = template
    return made


def build(family: str = "llama", kv: str = "deferred", **settings: Any) -> Callable[[], Engine]:
    """Makes engines over a tiny model with exits, or with routers."""
    template = settings.pop("template", TEMPLATE)
    chosen = {"max_requests": 8, "num_pages": 256, "page_size": 8, **settings}
    # Of its own: while an engine works, the model's attention is the engine's, and another thread cannot use it.
    model = copy.deepcopy(model_of(family, kv))
    return lambda: Engine(model, tokenizer(template=template), kv=kv, force_kv=True, **chosen)


def slowly(builder: Callable[[], Engine], seconds: float = 0.01) -> Callable[[], Engine]:
    """The same engine, with iterations of at least so long."""

    def made() -> Engine:
        engine = builder()
        step = engine.step

        def slow() -> None:
            time.sleep(seconds)
            step()

        engine.step = slow  # type: ignore[method-assign]
        return engine

    return made


@dataclass
class Running:
    """A server that answers."""

    url: str
    host: EngineHost
    server: Server
    thread: threading.Thread

    @property
    def client(self) -> openai.OpenAI:
        """OpenAI's client of it."""
        key = self.host.settings.api_key or "none"
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    @property
    def http(self) -> httpx.Client:
        """Any client of it."""
        return httpx.Client(base_url=self.url, timeout=60)

    @property
    def pages_used(self) -> int:
        """In the engine, now."""
        return self.engine_says(lambda engine: engine.pages.num_used)

    def engine_says(self, function: Callable[[Engine], Any]) -> Any:
        """What ``function`` finds between two iterations."""
        return self.host.ready().thread.call(function).result(30)

    def is_idle(self, seconds: float = 20.0) -> bool:
        """Whether the engine gets to have nothing to do, and no page in use."""
        return eventually(lambda: self.engine_says(lambda engine: not engine.has_work) and not self.pages_used, seconds)

    def stop(self) -> None:
        """End it as a signal does."""
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


def eventually(condition: Callable[[], Any], seconds: float = 20.0) -> bool:
    """Whether ``condition`` comes true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


@contextlib.contextmanager
def running(builder: Callable[[], Engine] | None = None, *, wait: bool = True, **settings: Any) -> Iterator[Running]:
    """A server, until the block ends."""
    chosen = ServerSettings(**{"model_name": NAME, **settings})
    listener = listen("127.0.0.1", 0)
    app = create_app(builder or build(), chosen)
    server = Server(config_of(app, chosen), app.state.host)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    made = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.host, server, thread)
    try:
        if wait:
            assert eventually(lambda: made.host.state == "ready", 60), made.host.load_error
        yield made
    finally:
        made.stop()
