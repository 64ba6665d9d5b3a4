"""Web pages of other origins, and the methods that browsers and monitors use besides GET and POST."""

from __future__ import annotations

import pytest

from helpers.running import build, running
from recursify.errors import SettingsError
from recursify.server.settings import ServerSettings

PAGE, OTHER = "http://localhost:3000", "https://chat.example.org"
KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def shared():
    """A server with a key, for pages of two origins."""
    with running(build(), api_key=KEY, cors_origin=(PAGE, OTHER)) as made:
        yield made


def preflight(server, origin: str) -> object:
    """What a browser asks before it posts JSON with a key."""
    headers = {"origin": origin, "access-control-request-method": "POST"}
    headers["access-control-request-headers"] = "authorization,content-type"
    return server.http.options("/v1/chat/completions", headers=headers)


@pytest.mark.parametrize("origin", [PAGE, OTHER])
def test_pages_of_named_origins_may_ask(shared, origin):
    """Without the key in the preflight; errors have the header too, or the page could not read them."""
    answer = preflight(shared, origin)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"]
    key = {"authorization": f"Bearer {KEY}", "origin": origin}
    body = {"prompt": "x", "max_tokens": 1}
    for headers, status in ((key, 200), ({"origin": origin}, 401)):
        answer = shared.http.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == origin
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert shared.http.get("/v1/nothing", headers=key).headers["access-control-allow-origin"] == origin


def test_other_pages_may_not(shared, server):
    """An origin that was not named, and any where none was."""
    answer = preflight(shared, "https://elsewhere.example.org")
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers
    assert "access-control-allow-origin" not in server.http.get("/health", headers={"origin": PAGE}).headers
    assert "access-control-allow-origin" not in preflight(server, PAGE).headers


def test_all_pages_may_with_an_asterisk():
    with running(build(), cors_origin="*") as made:
        assert preflight(made, OTHER).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", ["localhost:3000", "http://a.org/", "http://a.org/page", "HTTP://A.org", "a b", ""])
def test_what_is_no_origin_is_refused(origin):
    """It would allow nobody, without a word."""
    with pytest.raises(SettingsError, match=r"cors_origin: .* is not an origin, which is a scheme, a host and a port"):
        ServerSettings(cors_origin=(origin,))


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json"])
def test_head_is_answered_like_get(server, path):
    """The same status and type, without the body."""
    found, expected = server.http.head(path), server.http.get(path)
    assert (found.status_code, found.headers["content-type"]) == (200, expected.headers["content-type"])
    assert found.content == b""
    if path != "/metrics":
        assert found.headers["content-length"] == expected.headers["content-length"]
    assert server.http.head("/v1/models/other").status_code == 404


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/completions", "OPTIONS, POST"),
        ("/v1/chat/completions", "OPTIONS, POST"),
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v1/models/tiny", "GET, HEAD, OPTIONS"),
        ("/", "GET, HEAD, OPTIONS"),
    ],
)
def test_options_tells_the_methods(server, shared, path, methods):
    """With and without a key; a wrong method is told them as well."""
    for each in (server, shared):
        answer = each.http.options(path)
        assert (answer.status_code, answer.headers["allow"], answer.content) == (204, methods, b"")
    refused = server.http.delete(path)
    assert (refused.status_code, refused.headers["allow"]) == (405, methods)
    assert "Method not allowed" in refused.json()["error"]["message"]
    assert server.http.options("/v1/nothing").status_code == 404
