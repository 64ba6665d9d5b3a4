"""The page at ``/``, in a real browser."""

from __future__ import annotations

import re

import pytest

from helpers.browser import CHROMIUM, browser
from helpers.running import build, running
from recursify.engine import SamplingParams
from recursify.modeling import ExitSettings, make_policy
from recursify.server.page import CONTENT_SECURITY_POLICY, PAGE

KEY = "a-key-of-the-test"


def test_it_needs_nothing_else(server):
    """One file, which says that nothing may be loaded from elsewhere; scripts are let in by their digests."""
    answer = server.http.get("/")
    assert answer.text == PAGE
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert CONTENT_SECURITY_POLICY.startswith("default-src 'none'; connect-src 'self'")
    assert CONTENT_SECURITY_POLICY.count("'sha256-") == 2
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert not re.search(r"https?://|src=|@import|url\(", PAGE)


@pytest.fixture(scope="module")
def page():
    """A browser's."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    with browser() as made:
        yield made


def fill(page, **values: object) -> None:
    """Enter ``values`` into the fields of those names."""
    for name, value in values.items():
        page.run(f"(e => {{ e.value = {str(value)!r}; e.dispatchEvent(new Event('change')) }})(at({name!r}))")


def send(page, text: str) -> None:
    """Type ``text``, press the button, and wait for the end of the answer."""
    fill(page, prompt=text)
    page.run("at('send').click()")
    page.until("at('send').textContent === 'Send'")


def test_tokens_are_coloured_by_their_depth(page, server, tmp_path):
    """The texts are the engine's, the colours and the histogram the depths'; the console has nothing to say."""
    page.open(server.url)
    page.until("document.title === 'tiny'")
    fill(page, policy="confidence", threshold="0.02", tokens=40)
    send(page, "hi")
    exits = ExitSettings(make_policy("confidence", 0.02))
    (expected,) = build()().generate(["<user>hi\n<assistant>"], SamplingParams(max_tokens=40, exit=exits))
    tokens = page.run("[...document.querySelectorAll('.token')].map(e => [e.textContent, +e.dataset.depth])")
    assert "".join(text for text, _ in tokens) == expected.text
    assert [depth for _, depth in tokens] == expected.depths
    colours = page.run("[...document.querySelectorAll('.token')].map(e => e.style.backgroundColor)")
    assert len(set(colours)) == len(set(expected.depths)) > 1
    bars = page.run("[...document.querySelectorAll('.bar b')].map(e => +e.textContent)")
    assert bars == [expected.depths.count(depth) for depth in range(3)]
    mean = 1 + sum(expected.depths) / len(expected.depths)
    assert float(page.run("at('mean').textContent")) == pytest.approx(mean, abs=0.01)
    assert float(page.run("at('speed').textContent")) > 0
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert page.complaints == []


def test_it_goes_on_with_the_conversation(page, server):
    """The second answer knows the first."""
    page.open(server.url)
    page.until("document.title === 'tiny'")
    fill(page, tokens=8)
    send(page, "hi")
    send(page, "more")
    first, second = page.run("[...document.querySelectorAll('.assistant')].map(e => e.textContent)")
    engine = build()()
    (one,) = engine.generate(["<user>hi\n<assistant>"], SamplingParams(max_tokens=8))
    prompt = f"<user>hi\n<assistant>{one.text}\n<user>more\n<assistant>"
    (two,) = engine.generate([prompt], SamplingParams(max_tokens=8))
    assert (first, second) == (one.text, two.text)


def test_an_answer_can_be_stopped(page, server):
    """The same button ends it, and the engine has nothing left to do."""
    page.open(server.url)
    page.until("document.title === 'tiny'")
    fill(page, tokens=230, prompt="hi")
    page.run("at('send').click()")
    page.until("document.querySelectorAll('.token').length > 3")
    page.run("at('send').click()")
    page.until("at('send').textContent === 'Send'")
    assert page.run("document.querySelectorAll('.token').length") < 230
    assert server.is_idle()


def test_it_asks_for_the_key(page):
    """A locked server: the message, then the field, then the answer."""
    with running(build(), api_key=KEY) as locked:
        page.open(locked.url)
        page.until("document.title === 'tiny'")
        assert page.run("at('key-label').hidden")
        send(page, "hi")
        assert page.run("document.querySelector('.error').textContent").startswith("No API key was sent")
        assert not page.run("at('key-label').hidden")
        fill(page, key=KEY, tokens=5)
        send(page, "hi")
        assert page.run("document.querySelectorAll('.token').length") == 5
