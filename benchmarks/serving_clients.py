"""A server in a process of its own, and its clients in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx


@dataclass
class ServerProcess:
    """A server that takes requests.

    Attributes:
        url: Address of the server.
        process: Process of the server.
        engine_pid: Id of the engine's process; None for another program's server.
    """

    url: str
    process: subprocess.Popen
    engine_pid: int | None = None

    @property
    def resident_bytes(self) -> dict[str, int]:
        """Resident memory of both processes in bytes."""
        assert self.engine_pid is not None
        return {"server": resident_bytes(self.process.pid), "engine": resident_bytes(self.engine_pid)}

    def metrics(self) -> dict[str, float]:
        """Read the metrics, by name with labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


def resident_bytes(pid: int) -> int:
    """Resident memory of a process in bytes."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


@contextlib.contextmanager
def served(model: str, *arguments: str) -> Iterator[ServerProcess]:
    """Run ``recursify serve`` on a free port until the block ends."""
    command = [sys.executable, "-m", "recursify", "serve", model, "--name", "model", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = None
        for line in process.stderr:
            event = json.loads(line) if line.startswith("{") else {}
            url = event.get("url", url)
            if event.get("event") == "ready":
                break
        else:
            raise SystemExit("The server did not start.")
        # The log is discarded: a full pipe would block the server.
        threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()
        assert url is not None
        yield ServerProcess(url, process, event["engine_pid"])
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def served_by_transformers(folder: str, *arguments: str) -> Iterator[ServerProcess]:
    """Run ``transformers serve`` with continuous batching, over a copy of ``folder`` without an EOS."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as copy:
        endless = Path(copy, "model")
        shutil.copytree(folder, endless)
        settings = json.loads((endless / "generation_config.json").read_text(encoding="utf-8"))
        (endless / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": -1}), encoding="utf-8")
        program = Path(sys.executable).with_name("transformers")
        options = ["--continuous-batching", "--port", str(port), "--log-level", "error", *arguments]
        command = [program, "serve", endless, *options]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            while True:
                if process.poll() is not None:
                    raise SystemExit("transformers serve did not start.")
                try:
                    httpx.get(f"{url}/health", timeout=5)
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield ServerProcess(url, process)
        finally:
            process.terminate()
            process.wait(60)


@dataclass
class Streamed:
    """Measurements of one streamed response.

    Attributes:
        tokens: Number of new tokens by the server's usage.
        first: Seconds to the first token.
        seconds: Seconds to the end.
    """

    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0


@dataclass
class Load:
    """Responses to many clients, each of which sends its next request after a response.

    Attributes:
        answers: Measurements of all responses.
        seconds: Duration of the load.
    """

    answers: list[Streamed] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of all clients together."""
        return sum(answer.tokens for answer in self.answers) / self.seconds


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> Streamed:
    """Stream one response to its end."""
    found, started = Streamed(), time.perf_counter()
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body | usage) as answer:
        answer.raise_for_status()
        last = b""
        async for data in answer.aiter_raw():
            if not found.first and b"data: {" in data:
                found.first = time.perf_counter() - started
            last = (last + data)[-4096:]
    found.seconds = time.perf_counter() - started
    events = [line for line in last.split(b"\n") if line.startswith(b"data: {")]
    found.tokens = json.loads(events[-1].removeprefix(b"data: "))["usage"]["completion_tokens"]
    return found


async def load(url: str, clients: int, bodies: list[dict[str, Any]]) -> Load:
    """Send ``bodies`` from ``clients`` concurrent clients."""
    waiting, found = iter(bodies), Load()

    async def one(client: httpx.AsyncClient) -> None:
        for body in waiting:
            found.answers.append(await stream(client, body))

    async with connected(url, clients) as client:
        started = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        found.seconds = time.perf_counter() - started
    return found


@contextlib.asynccontextmanager
async def connected(url: str, connections: int) -> AsyncIterator[httpx.AsyncClient]:
    """Open a client with this many connections."""
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600) as client:
        yield client
