"""Soak test of a server: everything that clients do, and the resources in use afterwards."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import Any

import httpx

from recursify.cli.report import talk
from serving_clients import ServerProcess, connected, stream

BAD: tuple[tuple[dict[str, Any], int], ...] = (
    ({"content": b"{"}, 400),
    ({"content": b'{"prompt": "\xff"}'}, 400),
    ({"content": b" " * 3_000_000}, 413),
    ({"json": {"prompt": "x", "stop": ["a"] * 10_000}}, 400),
    ({"json": {"prompt": "x", "max_tokens": -1}}, 400),
    ({"json": {"prompt": [10**9]}}, 400),
    ({"json": {"prompt": "x", "exit": {"policy": "oracle"}}}, 400),
    ({"json": {"prompt": "x", "unheard": "of"}}, 400),
)
"""Invalid requests, and the statuses of their responses."""


class Soak:
    """Clients with random behaviour.

    Args:
        server: Server to test.
        prompts: Texts of prompts.
        seed: Seed of the behaviour.
        clients: Number of concurrent clients.
        new_tokens: Maximum number of new tokens of a response.

    Attributes:
        done: Number of requests per behaviour.
        wrong: Number of failures by description, among them requests without a response.
        memory: Resident bytes of both processes, every few seconds.
    """

    def __init__(self, server: ServerProcess, prompts: list[str], *, seed: int, clients: int, new_tokens: int) -> None:
        self.server, self.prompts, self.clients, self.new_tokens = server, prompts, clients, new_tokens
        self.draw = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.memory: list[dict[str, int]] = []

    async def run(self, minutes: float, requests: int) -> dict[str, Any]:
        """Send requests until the time is over or their number is reached; then wait for the server to be idle."""
        deadline, started = time.monotonic() + 60 * minutes, time.monotonic()
        watching = asyncio.create_task(self._watch())

        async def one(client: httpx.AsyncClient) -> None:
            while time.monotonic() < deadline and self.done.total() < requests:
                await self._act(client)

        async with connected(self.server.url, self.clients + 8) as client:
            await asyncio.gather(*(one(client) for _ in range(self.clients)))
        watching.cancel()
        seconds = time.monotonic() - started
        left = await self._left_over()
        samples = [*self.memory, self.server.resident_bytes]
        settled = samples[len(samples) // 5 :]
        return {
            "requests": self.done.total(),
            "seconds": round(seconds, 1),
            "done": dict(sorted(self.done.items())),
            "wrong": dict(self.wrong),
            "resident_mib": {
                name: {
                    "after_a_fifth": _mib(settled[0][name]),
                    "at_the_end": _mib(settled[-1][name]),
                    "largest": _mib(max(sample[name] for sample in settled)),
                    "by_tenths": [_mib(samples[len(samples) * tenth // 10][name]) for tenth in range(10)],
                }
                for name in samples[0]
            },
            **left,
        }

    async def _act(self, client: httpx.AsyncClient) -> None:
        name = self.draw.choices(
            ("stream", "whole", "leave", "give up", "read slowly", "send no request"), (4, 3, 3, 1, 1, 2)
        )[0]
        self.done[name] += 1
        body = {
            "prompt": self.draw.choice(self.prompts),
            "max_tokens": self.draw.randint(1, self.new_tokens),
            "temperature": self.draw.choice((0, 0.8)),
            "n": self.draw.choice((1, 1, 1, 2)),
        }
        try:
            await getattr(self, "_" + name.replace(" ", "_"))(client, body)
        except (httpx.HTTPError, AssertionError, KeyError, ValueError) as error:
            self.wrong[f"{name}: {type(error).__name__} {error}"[:200]] += 1

    async def _stream(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        found = await stream(client, body | {"ignore_eos": True})
        assert found.tokens == body["max_tokens"] * body["n"], "tokens are missing"

    async def _whole(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code in (200, 429), f"status {answer.status_code}"

    async def _leave(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        events = self.draw.randint(0, 8)
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            async for _ in answer.aiter_raw():
                if (events := events - 1) < 0:
                    return

    async def _give_up(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        try:
            await client.post("/v1/completions", json=body, timeout=self.draw.uniform(0.01, 0.5))
        except httpx.TimeoutException:
            return

    async def _read_slowly(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            last = b""
            async for data in answer.aiter_raw():
                last = data
                await asyncio.sleep(self.draw.uniform(0, 0.05))
            assert last.endswith(b"data: [DONE]\n\n"), "the stream broke off"

    async def _send_no_request(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        sent, status = self.draw.choice(BAD)
        headers = {"content-type": "application/json"}
        answer = await client.post("/v1/completions", headers=headers, **sent)
        assert answer.status_code == status, f"status {answer.status_code} for {status}"

    async def _watch(self) -> None:
        while True:
            self.memory.append(self.server.resident_bytes)
            mib = ", ".join(f"{name} {_mib(size)} MiB" for name, size in self.memory[-1].items())
            talk.print(f"{self.done.total()} requests, {mib}, {self.wrong.total()} wrong")
            await asyncio.sleep(5)

    async def _left_over(self) -> dict[str, float]:
        """Requests and pages in use after all requests have ended."""
        names = ("recursify_running_requests", "recursify_waiting_requests", "recursify_pages_used")
        for _ in range(100):
            metrics = self.server.metrics()
            if not any(metrics[name] for name in names):
                break
            await asyncio.sleep(0.1)
        return {name.removeprefix("recursify_") + "_left": metrics[name] for name in names}


def _mib(size: int) -> float:
    return round(size / 2**20, 1)
