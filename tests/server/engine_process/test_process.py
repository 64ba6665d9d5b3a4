"""The engine in a process of its own: it answers as it does here, and its end is not the server's."""

from __future__ import annotations

import concurrent.futures
import os
import signal

import httpx
import openai
import pytest

from helpers.running import NAME, SLOW, build, eventually, running
from recursify.engine import SamplingParams
from recursify.modeling import ExitSettings, make_policy

LONG = {"model": NAME, "prompt": "hello", "max_tokens": 200, "temperature": 0}


@pytest.fixture(scope="module")
def apart():
    """A server whose engine is in another process."""
    with running(build(seconds=SLOW), own_process=True) as made:
        assert not made.engines
        yield made


@pytest.fixture(scope="module")
def engine():
    """Its twin."""
    return build()()


@pytest.mark.parametrize(
    ("asked", "params"),
    [
        ({"temperature": 0, "logprobs": 2}, {"logprobs": 2}),
        ({"temperature": 0.8, "top_p": 0.9, "seed": 5}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}),
        (
            {"temperature": 0, "extra_body": {"exit": {"policy": "confidence", "threshold": 0.1}}},
            {"exit": ExitSettings(make_policy("confidence", 0.1))},
        ),
        ({"temperature": 0, "stop": ["never comes", "8"]}, {"stop": ("never comes", "8")}),
    ],
    ids=["logprobs", "sampled", "exits", "stop"],
)
def test_answers_are_the_engines(apart, engine, asked, params):
    """Whole or streamed: text, depths, log-probabilities, finish reason."""
    (expected,) = engine.generate(["hello there"], SamplingParams(max_tokens=20, **params))
    arguments = {"model": NAME, "prompt": "hello there", "max_tokens": 20, **asked}
    choice = apart.client.completions.create(**arguments).choices[0]
    events = [event.choices[0] for event in apart.client.completions.create(**arguments, stream=True)]
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert choice.recursify["depths"] == expected.depths
    assert "".join(event.text for event in events) == expected.text
    assert [depth for event in events for depth in event.recursify["depths"]] == expected.depths
    if expected.logprobs is not None:
        values = [row[token] for row, token in zip(expected.logprobs, expected.token_ids, strict=True)]
        assert choice.logprobs.token_logprobs == pytest.approx(values)
        assert [value for event in events for value in event.logprobs.token_logprobs] == pytest.approx(values)


def test_a_prompt_is_scored_there(apart, server):
    """As in a thread of this process."""
    arguments = {"model": NAME, "prompt": "hello", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    here, there = (made.client.completions.create(**arguments).choices[0] for made in (server, apart))
    assert there.text == here.text
    assert there.logprobs.token_logprobs[1:] == pytest.approx(here.logprobs.token_logprobs[1:])


def test_a_refusal_comes_back(apart):
    """With the engine's own words."""
    with pytest.raises(openai.BadRequestError, match="together more than the 256") as caught:
        apart.client.completions.create(**LONG | {"max_tokens": 300})
    assert caught.value.code == "context_length_exceeded"


def test_who_leaves_is_cancelled_there(apart):
    """Streams and whole answers; pages come back."""
    with apart.client.completions.create(**LONG, stream=True) as stream:
        next(iter(stream))
        assert apart.num_requests == 1
        assert apart.says("pages_used") > 0
    with pytest.raises(httpx.ReadTimeout):
        apart.http.post("/v1/completions", json={**LONG, "n": 3}, timeout=0.3)
    assert apart.is_idle()
    assert apart.supervisor.admission.admitted == 0


def test_a_killed_engine_is_noticed_at_once(apart, caplog):
    """Every request gets a clear error, /health says how it ended, and /restart makes another that answers the same."""
    client = apart.supervisor.ready().client
    expected = apart.client.completions.create(**LONG | {"max_tokens": 20}).choices[0].text
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        whole = pool.submit(lambda: apart.http.post("/v1/completions", json=LONG))
        streams = [apart.client.completions.create(**LONG, stream=True) for _ in range(2)]
        for stream in streams:
            next(iter(stream))
        assert eventually(lambda: apart.num_requests == 3)
        seen = apart.says("generated_tokens_total")
        os.kill(client.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(openai.APIError, match=r"The engine has stopped .killed by SIGKILL.*POST /restart"):
                list(stream)
        answers = [whole.result(), apart.http.post("/v1/completions", json=LONG), apart.http.get("/health")]
    for answer in answers:
        assert answer.status_code == 503
        assert "The engine has stopped (killed by SIGKILL)" in answer.text
    assert answers[1].headers["retry-after"]
    assert answers[2].json()["status"] == "stopped"
    assert "the system is out of memory: see the kernel's log" in caplog.text
    assert (apart.says("up"), apart.num_requests, apart.says("pages_used")) == (0, 0, 0)
    assert apart.says("generated_tokens_total") == seen
    assert apart.supervisor.admission.admitted == 0
    assert apart.http.post("/restart").json() == {"status": "ready"}
    assert apart.supervisor.ready().client.pid != client.pid
    assert apart.http.get("/health").status_code == 200
    assert apart.client.completions.create(**LONG | {"max_tokens": 20}).choices[0].text == expected
    assert apart.says("generated_tokens_total") == seen + 20
