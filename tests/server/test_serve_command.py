"""``recursify serve`` as a process: from its first log line to the signal that ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import openai
import pytest
from running import tokenizer

from command_line import run
from tiny_models import convert_tiny, save_tiny

KEY = "a-key-of-the-test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a chat template."""
    home = tmp_path_factory.mktemp("serve")
    save_tiny(home / "dense")
    convert_tiny(home / "dense", home / "model", lora_rank=4)
    tokenizer().save_pretrained(home / "model")
    return home / "model"


def test_a_process_serves_until_it_is_told_to_end(folder):
    """It says where it listens and when it is ready, answers with the key of the environment, and exits with 0."""
    command = [sys.executable, "-m", "recursify", "serve", str(folder), "--port", "0", "--name", "mine"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "RECURSIFY_API_KEY": KEY}
    )
    try:
        events = {}
        assert process.stderr is not None
        while "ready" not in events:
            line = process.stderr.readline()
            assert line, "the server ended before it was ready"
            if line.startswith("{"):
                entry = json.loads(line)
                events[entry["event"]] = entry
        client = openai.OpenAI(base_url=f"{events['listening']['url']}/v1", api_key=KEY, max_retries=0)
        messages = [{"role": "user", "content": "hi"}]
        answer = client.chat.completions.create(model="mine", messages=messages, max_tokens=5)
        assert answer.usage.completion_tokens == 5
        with pytest.raises(openai.AuthenticationError, match="is not this server's"):
            client.with_options(api_key="another").models.list()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out) == (-signal.SIGTERM, "")
    assert "Traceback" not in err
    assert KEY not in err + str(events)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exit", "oracle"], "'oracle' is a simulation"),
        (["--exit", "head"], "needs exit heads, and the model has none"),
        (["--threshold", "0.5"], "for an exit policy, and none is named"),
        (["--api-key", "short"], "at least 8 characters"),
    ],
)
def test_what_cannot_be_served_is_said(folder, capsys, arguments, message):
    """Exit code 1 and one message, also where it shows only with the model."""
    assert run("serve", folder, "--port", 0, *arguments) == 1
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_model(tmp_path, capsys):
    """Its own error."""
    assert run("serve", tmp_path / "nowhere", "--port", 0) == 1
    assert "nowhere" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(folder, capsys, monkeypatch):
    """One line to type."""
    for name in [name for name in sys.modules if name.startswith(("recursify.server", "uvicorn"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert run("serve", folder) == 1
    assert "pip install 'recursify[serve]'" in capsys.readouterr().err
