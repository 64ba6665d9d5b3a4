"""From loading to the last answer: who leaves is cancelled, who stays is answered, and what breaks says so."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time

import httpx
import openai
import pytest

from helpers.running import NAME, SLOW, build, eventually, running
from recursify.engine import SamplingParams

LONG = {"model": NAME, "prompt": "hello", "max_tokens": 200, "temperature": 0}


@pytest.fixture(scope="module")
def slow():
    """A server whose answers of 200 tokens take some seconds."""
    with running(build(seconds=SLOW)) as made:
        yield made


# --- Leaving -----------------------------------------------------------------------------------------------------


def test_who_leaves_a_stream_is_cancelled(slow):
    """At once, with pages back; others go on."""
    with slow.client.completions.create(**LONG, stream=True) as stream:
        assert next(iter(stream)).choices[0].finish_reason is None
        assert slow.num_requests == 1
    started = time.monotonic()
    assert slow.is_idle()
    assert time.monotonic() - started < 1.0
    assert slow.supervisor.admission.admitted == 0


def test_who_leaves_a_whole_answer_is_cancelled(slow):
    """A caller who waits and gives up has nobody work for him, with any number of choices."""
    with pytest.raises(httpx.ReadTimeout):
        slow.http.post("/v1/completions", json={**LONG, "n": 3}, timeout=0.4)
    assert slow.is_idle()
    assert slow.supervisor.admission.admitted == 0


def test_who_leaves_while_waiting_is_cancelled():
    """A request that has not begun is forgotten."""
    with running(build(max_num_seqs=1, seconds=SLOW)) as made:
        with made.client.completions.create(**LONG, stream=True) as first:
            next(iter(first))
            with pytest.raises(httpx.ReadTimeout):
                made.http.post("/v1/completions", json=LONG, timeout=0.3)
            assert eventually(lambda: made.num_requests == 1)
        assert made.is_idle()


# --- Too much, too long ------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_back():
    """429 with Retry-After; the places are free again afterwards."""
    with running(build(max_num_seqs=1, seconds=SLOW), max_queue=1) as made:
        with made.client.completions.create(**LONG, stream=True), made.client.completions.create(**LONG, stream=True):
            answer = made.http.post("/v1/completions", json=LONG)
            assert answer.status_code == 429
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            error = answer.json()["error"]
            assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
            assert error["message"].startswith("2 completions are in progress")
        assert made.is_idle()
        assert made.client.completions.create(**LONG | {"max_tokens": 2}).usage.completion_tokens == 2
        with pytest.raises(openai.BadRequestError, match="asks for 3 completions; this server allows 2 at once"):
            made.client.completions.create(**LONG, n=3)


def test_an_answer_that_takes_too_long_is_ended():
    """504, or an event of a stream; no page stays in use."""
    with running(build(seconds=SLOW), request_timeout=0.5) as made:
        with pytest.raises(openai.APIStatusError, match=r"not ready within 0\.5 seconds") as caught:
            made.client.completions.create(**LONG)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"not ready within 0\.5 seconds"):
            list(made.client.completions.create(**LONG, stream=True))
        assert made.is_idle()


def test_a_reader_who_does_not_read_is_left():
    """His answer is dropped when he has not taken what was sent in time."""
    with running(build(max_num_seqs=64, num_pages=2048), write_timeout=0.3) as made:
        # Log-probabilities make the events large, so that the buffers between the two fill up.
        body = {**LONG, "logprobs": 20, "n": 16, "stream": True, "prompt": ["x"] * 4, "max_tokens": 200}
        with made.http.stream("POST", "/v1/completions", json=body) as stream:
            assert stream.status_code == 200
            assert eventually(lambda: made.supervisor.admission.admitted == 0, 30)
        assert made.is_idle()


# --- Beginning ---------------------------------------------------------------------------------------------------


def test_it_is_ready_only_when_it_is_loaded():
    """Until then requests and /health get 503 and the reason."""
    may_load = threading.Event()
    builder = build()

    def load():
        may_load.wait(30)
        return builder()

    with running(load, wait=False) as made:
        assert eventually(lambda: made.server.started)
        for answer in (made.http.get("/health"), made.http.post("/v1/completions", json=LONG)):
            assert answer.status_code == 503
            assert "The model is loading" in answer.text
        assert "recursify_up 0.0" in made.http.get("/metrics").text
        assert made.http.post("/restart").status_code == 409
        may_load.set()
        assert eventually(lambda: made.http.get("/health").status_code == 200)


# --- Ending ------------------------------------------------------------------------------------------------------


def test_shutting_down_finishes_answers():
    """Those under way are whole, streamed or not; new ones are told."""
    asked = LONG | {"max_tokens": 60}
    with running(build(seconds=SLOW)) as made, concurrent.futures.ThreadPoolExecutor(4) as pool:
        expected = made.client.completions.create(**asked).choices[0].text
        whole = [pool.submit(lambda: made.client.completions.create(**asked).choices[0].text) for _ in range(2)]
        stream = made.client.completions.create(**asked, stream=True)
        first = next(iter(stream)).choices[0].text
        assert eventually(lambda: made.num_requests == 3)
        made.server.should_exit = True
        assert [future.result() for future in whole] == [expected, expected]
        assert first + "".join(event.choices[0].text for event in stream) == expected
        made.thread.join(30)
        assert not made.thread.is_alive()


def test_shutting_down_tells_those_who_cannot_be_finished():
    """When the time for that is over, every request still gets an answer: that the server ends."""
    with running(build(seconds=0.1), shutdown_timeout=0.3) as made, concurrent.futures.ThreadPoolExecutor(1) as pool:
        whole = pool.submit(lambda: made.http.post("/v1/completions", json=LONG))
        stream = made.client.completions.create(**LONG, stream=True)
        next(iter(stream))
        assert eventually(lambda: made.num_requests == 2)
        made.server.should_exit = True
        answer = whole.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_closing")
        with pytest.raises(openai.APIError, match="The server is shutting down"):
            list(stream)


# --- Failing -----------------------------------------------------------------------------------------------------


def test_an_engine_that_fails_says_so_and_can_be_replaced(caplog):
    """All requests get a clear error without the inside of it; /restart makes another engine that answers the same."""

    def broken():
        raise RuntimeError("secret at /home/somebody")

    with running(build(seconds=SLOW)) as made, concurrent.futures.ThreadPoolExecutor(4) as pool:
        expected = made.client.completions.create(**LONG | {"max_tokens": 20}).choices[0].text
        whole = pool.submit(lambda: made.http.post("/v1/completions", json=LONG))
        stream = made.client.completions.create(**LONG, stream=True)
        next(iter(stream))
        assert eventually(lambda: made.num_requests == 2)
        made.engines[-1].step = broken
        answer = whole.result()
        with pytest.raises(openai.APIError, match=r"The engine has stopped \(RuntimeError\).*POST /restart"):
            list(stream)
        later = made.http.post("/v1/completions", json=LONG)
        health = made.http.get("/health")
        for found in (answer, later, health):
            assert found.status_code == 503
            assert "The engine has stopped (RuntimeError)" in found.text
            assert "secret" not in found.text
        assert health.json()["status"] == "stopped"
        assert "in broken" in caplog.text
        assert "secret at /home/somebody" in caplog.text
        assert "recursify_up 0.0" in made.http.get("/metrics").text
        tokens = made.says("generated_tokens_total")
        assert made.http.post("/restart").json() == {"status": "ready"}
        assert made.http.get("/health").status_code == 200
        assert made.client.completions.create(**LONG | {"max_tokens": 20}).choices[0].text == expected
        assert made.says("generated_tokens_total") >= tokens + 20
        assert made.is_idle()


def test_a_bug_in_taking_a_request_is_that_requests_error(caplog):
    """500 with the request's id, whole or streamed, and the traceback in the log; the engine goes on."""

    def broken(prompt, params):
        raise RuntimeError("secret at /home/somebody")

    with running() as made:
        add, made.engines[-1].add = made.engines[-1].add, broken
        for stream in (False, True):
            answer = made.http.post("/v1/completions", json=LONG | {"stream": stream})
            assert answer.status_code == 500
            assert answer.headers["x-request-id"] in answer.text
            assert "secret" not in answer.text
        assert caplog.text.count("secret at /home/somebody") >= 2
        made.engines[-1].add = add
        assert made.client.completions.create(**LONG | {"max_tokens": 3}).usage.completion_tokens == 3


def test_a_restart_that_fails_says_so():
    """And can be tried again."""
    builder, fails = build(), [False, True, False]

    def load():
        if fails.pop(0):
            raise MemoryError("no room")
        return builder()

    with running(load) as made:
        made.engines[-1].step = None
        made.http.post("/v1/completions", json=LONG)
        answer = made.http.post("/restart")
        assert answer.status_code == 503
        assert "(MemoryError)" in answer.text
        assert made.http.post("/restart").status_code == 200


# --- Many --------------------------------------------------------------------------------------------------------


def test_many_streams_at_once_are_each_what_they_are_alone(server):
    """Twenty-four streams of different prompts, with the engine's eight rows."""
    prompts = [f"prompt {number}" for number in range(24)]
    engine = build()()
    expected = [output.text for output in engine.generate(prompts, SamplingParams(max_tokens=24))]

    def streamed(prompt: str) -> str:
        text = ""
        body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": True}
        with server.http as client, client.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        return text

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        assert list(pool.map(streamed, prompts)) == expected
    assert server.is_idle()
