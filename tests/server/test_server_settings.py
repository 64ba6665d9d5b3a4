"""A server's settings."""

from __future__ import annotations

import pytest

from helpers.running import build
from recursify.errors import EngineError, SettingsError
from recursify.server.app import create_app
from recursify.server.run import serve_model
from recursify.server.settings import ServerSettings
from recursify.server.uvicorn_server import listen


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, got 0"),
        ({"max_queue": -1}, "max_queue must be a whole number of at least 0, got -1"),
        ({"request_timeout": 0}, "request_timeout must be a number above 0, got 0"),
        ({"api_key": "short"}, "must have at least 8 ASCII characters"),
        ({"api_key": "with a space"}, "no spaces"),
        ({"api_key": "schlüssel-lang"}, "ASCII"),
    ],
)
def test_limits_that_let_nothing_through(fields, message):
    """Each is refused by name."""
    with pytest.raises(SettingsError, match=message):
        ServerSettings(model_name="m", **fields)


def test_the_key_is_not_shown():
    """Not in what an error or a log would print of the settings."""
    assert "hunter2hunter2" not in repr(ServerSettings(model_name="m", api_key="hunter2hunter2"))


def test_simulations_are_not_served():
    """They run every recursion; the server refuses them before it loads a model."""
    with pytest.raises(SettingsError, match="'oracle' is a simulation"):
        create_app(build(), ServerSettings(exit_policy="oracle"))
    with pytest.raises(SettingsError, match=r"Unknown exit policy\. Use one of: head"):
        create_app(build(), ServerSettings(exit_policy="often"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_seqs": 3}, SettingsError, "Unknown setting 'max_seqs'. Did you mean 'max_num_seqs'?"),
        ({"max_num_seqs": 0}, EngineError, "max_num_seqs must be a whole number of at least 1, got 0"),
        ({"settings": ServerSettings(), "max_tokens": 3}, SettingsError, "Got settings and also max_tokens"),
        ({"exit_policy": "oracle"}, SettingsError, "'oracle' is a simulation"),
    ],
)
def test_invalid_arguments_of_serve_model(options, error, message):
    """Each fails before a model is loaded."""
    with pytest.raises(error, match=message):
        serve_model("nowhere", port=0, **options)


def test_a_port_in_use():
    """It is named, with what to do."""
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"Cannot listen on 127.0.0.1 port {port}: .*Choose another --port"):
            listen("127.0.0.1", port)
