"""What is not answered: the right status, a message that helps, and nothing of the inside."""

from __future__ import annotations

import contextlib
import json
import re
import socket

import httpx
import pytest

from helpers.running import NAME, Running, build, running

JSON = {"content-type": "application/json"}
CHAT = {"messages": [{"role": "user", "content": "x"}]}


def refused(answer: httpx.Response, status: int, message: str) -> dict:
    """The error of an answer, which is OpenAI's in form and says nothing of files or code."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.search(message, error["message"]), error
    assert not re.search(r"Traceback|\.py|File \"|/site-packages|/src/|recursify\.", answer.text)
    assert answer.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {}, "prompt: Field required"),
        ("completions", {"prompt": "x", "max_tokens": -1}, "max_tokens: Input should be greater than or equal to 1"),
        ("completions", {"prompt": "x", "max_tokens": 5000}, "max_tokens: At most 4096 new tokens are allowed"),
        ("completions", {"prompt": "x", "max_tokens": 4000}, "together more than the 256 that a request can have"),
        ("completions", {"prompt": "x", "max_tokens": 1e400}, "max_tokens"),
        ("completions", {"prompt": "x", "temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ("completions", {"prompt": "x", "temperature": float("nan")}, "temperature: Input should be a finite number"),
        ("completions", {"prompt": "x", "top_p": 0}, "top_p: Input should be greater than 0"),
        ("completions", {"prompt": "x", "n": 0}, "n: Input should be greater than or equal to 1"),
        ("completions", {"prompt": "x", "n": 17}, "n: At most 16 choices are allowed, got 17"),
        ("completions", {"prompt": "x", "seed": 2**64}, "seed: Input should be less than"),
        ("completions", {"prompt": "x", "seed": "1"}, "seed: Input should be a valid integer"),
        ("completions", {"prompt": "x", "stop": ["a"] * 10_000}, "At most 16 stop strings are allowed, got 10000"),
        ("completions", {"prompt": "x", "stop": "a" * 129}, "stop: At most 128 characters per string are allowed"),
        ("completions", {"prompt": "x", "stop": ["a", ""]}, "stop: A stop string is empty. Remove it"),
        ("completions", {"prompt": "x", "logprobs": 21}, "logprobs: Input should be less than or equal to 20"),
        ("completions", {"prompt": "x", "logprobs": -1}, "logprobs: Input should be greater than or equal to 0"),
        ("completions", {"prompt": "x", "echo": True, "stream": True}, "echo is not supported with stream=true"),
        ("completions", {"prompt": "x", "stream_options": {"continuous_usage_stats": True}}, "continuous_usage_stats"),
        ("completions", {"prompt": "x", "suffix": "y"}, "suffix is not supported by this server"),
        ("completions", {"prompt": "x", "tempurature": 1}, "tempurature: Unknown field"),
        ("completions", {"prompt": "\ud800"}, "prompt: The text has a lone surrogate"),
        ("completions", {"prompt": ""}, "prompt: It has no tokens"),
        ("completions", {"prompt": []}, "prompt: The list is empty"),
        ("completions", {"prompt": [[1], []]}, "prompt: It has no tokens"),
        ("completions", {"prompt": {"a": 1}}, "prompt: The value has none of the types"),
        ("completions", {"prompt": [999]}, "Token 999 is not in the model's vocabulary of 260 entries"),
        ("completions", {"prompt": [-1]}, "prompt"),
        (
            "completions",
            {"prompt": [5, 260], "echo": True, "logprobs": 1},
            "Token 260 is not in the model's voc",
        ),
        ("completions", {"prompt": "x" * 300}, "prompt: It has 300 tokens; at most 255 are allowed"),
        ("completions", {"prompt": ["x"] * 129}, "prompt: At most 128 prompts are allowed, got 129"),
        ("completions", {"prompt": "x", "exit": {"policy": "oracle"}}, "'oracle' is a simulation.*is not served"),
        ("completions", {"prompt": "x", "exit": {"policy": "often"}}, "Unknown exit policy. Use one of: head, conf"),
        (
            "completions",
            {"prompt": "x", "exit": {"threshold": 0.5}},
            "exit policies without a policy: threshold",
        ),
        ("completions", {"prompt": "x", "exit": {"policy": "confidence", "min_depth": 7}}, "no exit after depth 7"),
        ("completions", {"prompt": "x", "exit": {"policy": "confidence", "threshold": 7}}, "threshold"),
        ("completions", {"prompt": "x", "exit": {"policy": "head", "threshold": [0.1] * 3}}, "has 3 thresholds"),
        ("completions", {"prompt": "x", "exit": {"max_depth": -1}}, "exit.max_depth: Input should be greater than"),
        ("completions", {"prompt": "x", "exit": "head"}, "exit: Input should be"),
        ("chat/completions", {**CHAT, "max_completion_tokens": -5}, "max_completion_tokens: Input should be greater"),
        ("chat/completions", {**CHAT, "max_completion_tokens": 9999}, "max_completion_tokens: At most 4096 new"),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs requires logprobs=true"),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, "tools is not supported by this server"),
        ("chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, "response_format is not supported"),
    ],
)
def test_what_cannot_be_answered_is_a_400(server, path, body, message):
    """The field, and what it may be."""
    answer = server.http.post(f"/v1/{path}", content=json.dumps(body), headers=JSON)
    assert refused(answer, 400, message)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"{", JSON, 400, r"The body is not JSON \(at character 1\)"),
        (b'{"prompt": "\xff"}', JSON, 400, "it must be JSON in UTF-8"),
        (b"[" * 100_000, JSON, 400, "it must be JSON in UTF-8"),
        (b"[]", JSON, 400, "must be a JSON object"),
        (b"", JSON, 400, "must be a JSON object"),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, 400, "must be a JSON object, sent as application/json"),
        (b'{"prompt": "x", "n": 1' + b"0" * 5000 + b"}", JSON, 400, ""),
        (b"x" * (2 * 2**20 + 1), JSON, 413, "larger than 2097152 bytes"),
    ],
)
def test_what_is_no_request(server, content, headers, status, message):
    """Broken, deep, huge and foreign bodies."""
    refused(server.http.post("/v1/completions", content=content, headers=headers), status, message)


def test_a_huge_body_without_a_length_is_counted(server):
    """As it comes; who sends it learns why it was not taken."""

    def endless():
        for _ in range(64):
            yield b" " * 2**17

    answer = server.http.post("/v1/completions", content=endless(), headers=JSON)
    refused(answer, 413, "larger than 2097152 bytes")


def test_an_endless_body_is_cut_off(server):
    """Somewhere: it is neither kept nor read for ever. Whether its sender sees why depends on the network."""
    sent = 0

    def endless():
        nonlocal sent
        while True:
            sent += 2**20
            yield b" " * 2**20

    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        refused(server.http.post("/v1/completions", content=endless(), headers=JSON), 413, "larger than 2097152")
    assert 34 * 2**20 <= sent < 100 * 2**20


def test_other_addresses_and_methods(server):
    """404 and 405 are errors of the same form."""
    refused(server.http.get("/v1/nothing"), 404, "Not found. See /openapi.json")
    refused(server.http.get("/v1/completions"), 405, "Method not allowed for this path")
    refused(server.http.get("/v1/models/other"), 404, "serves 'tiny'")


def test_ids_are_kept_if_they_are_fit(server):
    """A caller's id comes back, unless it is no id."""
    for given, kept in (("my-id.7", True), ("a b", False), ("x" * 65, False)):
        found = server.http.get("/health", headers={"x-request-id": given}).headers["x-request-id"]
        assert (found == given) is kept


# --- The key -----------------------------------------------------------------------------------------------------


KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def locked():
    """A server with a key, which gives a body half a second."""
    with running(build(), api_key=KEY, body_timeout=0.5) as made:
        yield made


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (None, "No API key was sent. Send it as: Authorization: Bearer KEY"),
        ("Bearer", "No API key was sent"),
        (f"Basic {KEY}", "No API key was sent"),
        ("Bearer wrong", "The API key is not valid for this server"),
        (f"Bearer {KEY}x", "The API key is not valid for this server"),
        (b"Bearer \xff\xfe", "The API key is not valid for this server"),
    ],
)
def test_without_the_key_there_is_no_answer(locked, sent, message):
    """No key and a wrong one: 401, everywhere but at what is open."""
    headers = {} if sent is None else {"authorization": sent}
    for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/restart")):
        answer = locked.http.request(method, path, headers=headers)
        assert refused(answer, 401, message)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/health", "/openapi.json"):
        assert locked.http.get(path, headers=headers).status_code == 200


def test_with_the_key_there_is(locked):
    """As OpenAI's client sends it."""
    assert locked.client.completions.create(model=NAME, prompt="x", max_tokens=2).usage.completion_tokens == 2


def raw(server: Running, head: str, body: bytes = b"") -> bytes:
    """What comes back for bytes that no client would send."""
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=20) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + body)
        found = b""
        while more := connection.recv(65536):
            found += more
    return found


def test_a_body_that_does_not_come_is_not_waited_for(locked):
    """408, and the connection is closed."""
    head = f"POST /v1/completions HTTP/1.1\nHost: x\nAuthorization: Bearer {KEY}\nContent-Length: 50\n\n"
    found = raw(locked, head, b'{"prompt"')
    assert found.startswith(b"HTTP/1.1 408")
    assert b"did not arrive within 0.5 seconds" in found


def test_a_body_that_says_it_is_huge_is_not_read(locked):
    """413 before a byte of it has come."""
    head = f"POST /v1/completions HTTP/1.1\nHost: x\nAuthorization: Bearer {KEY}\nContent-Length: {10**15}\n\n"
    assert raw(locked, head).startswith(b"HTTP/1.1 413")


def test_headers_without_end_are_cut_off(locked):
    """Before anyone has shown a key, and before they have ended; whether the sender sees why depends on the network."""
    with contextlib.suppress(ConnectionError):
        assert raw(locked, "GET / HTTP/1.1\nHost: x\nA: " + "x" * 200_000).startswith(b"HTTP/1.1 400")


# --- Logs --------------------------------------------------------------------------------------------------------


def test_logs_have_sizes_and_no_contents(locked, capsys):
    """JSON lines with the request's id; neither prompt, nor answer, nor key, nor address of a mistyped path."""
    from recursify.server.uvicorn_server import log_to_stderr

    log_to_stderr()
    answer = locked.http.post(
        "/v1/completions?secret=query",
        json={"prompt": "PRIVATE-PROMPT", "max_tokens": 3, "stop": "PRIVATE-STOP"},
        headers={"authorization": f"Bearer {KEY}", "x-request-id": "known"},
    )
    locked.http.post("/v1/completions", json={"prompt": 5}, headers={"authorization": "Bearer PRIVATE-GUESS"})
    locked.http.get("/PRIVATE-PATH", headers={"authorization": f"Bearer {KEY}"})
    lines = capsys.readouterr().err.splitlines()
    entries = [json.loads(line) for line in lines]
    (mine,) = [entry for entry in entries if entry.get("id") == "known"]
    assert (mine["status"], mine["route"]) == (200, "/v1/completions")
    assert (mine["prompt_tokens"], mine["completion_tokens"]) == (14, 3)
    assert {"time", "level", "event", "seconds", "client", "first_token_seconds", "mean_depth"} <= set(mine)
    text = "\n".join(lines)
    assert "PRIVATE" not in text
    assert "secret" not in text
    assert KEY not in text
    assert answer.json()["choices"][0]["text"] not in text
