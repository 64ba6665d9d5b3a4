"""``recursify serve`` as a process: from its first log line to the signal that ends it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from helpers.command_line import run
from helpers.running import eventually, tokenizer
from helpers.tiny_models import convert_tiny, save_tiny

KEY = "a-key-of-the-test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a chat template."""
    home = tmp_path_factory.mktemp("serve")
    save_tiny(home / "dense")
    convert_tiny(home / "dense", home / "model", lora_rank=4)
    tokenizer().save_pretrained(home / "model")
    return home / "model"


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """As they were before: a server that runs here writes to the error stream of its test, which is closed then."""
    both = [logging.getLogger(name) for name in ("recursify.server", "uvicorn")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in both]
    yield
    for logger, (handlers, propagate, level) in zip(both, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


class Served:
    """``recursify serve`` in a process and a session of its own, as a terminal would have it.

    Attributes:
        events: By name, what it has logged up to being ready.
    """

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "recursify", "serve", str(folder), "--port", "0", "--name", "mine"]
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RECURSIFY_API_KEY": KEY},
            start_new_session=True,
        )
        self.events: dict[str, dict] = {}
        assert self.process.stderr is not None
        while "ready" not in self.events:
            line = self.process.stderr.readline()
            assert line, "the server ended before it was ready"
            if line.startswith("{"):
                entry = json.loads(line)
                self.events[entry["event"]] = entry
        self.client = openai.OpenAI(base_url=f"{self.events['listening']['url']}/v1", api_key=KEY, max_retries=0)

    @property
    def engine_runs(self) -> bool:
        """Whether there is a process of that number that has not ended."""
        try:
            status = Path(f"/proc/{self.events['ready']['engine_pid']}/stat").read_text(encoding="utf-8")
        except FileNotFoundError:
            return False
        return status.rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def served(folder):
    """It is gone afterwards, whatever happened."""
    made = Served(folder)
    yield made
    made.process.kill()
    made.process.communicate()


def test_a_process_serves_until_it_is_told_to_end(served):
    """It says where it listens and when it is ready, answers with the key of the environment, and ends with its signal.

    Which the engine's process gets, too, and leaves to the server's: answers under way are finished.
    """
    messages = [{"role": "user", "content": "hi"}]
    answer = served.client.chat.completions.create(model="mine", messages=messages, max_tokens=5)
    assert answer.usage.completion_tokens == 5
    with pytest.raises(openai.AuthenticationError, match="is not valid for this server"):
        served.client.with_options(api_key="another").models.list()
    long = {"model": "mine", "prompt": "hello", "max_tokens": 200, "temperature": 0}
    expected = served.client.completions.create(**long).choices[0].text
    stream = served.client.completions.create(**long, stream=True)
    text = next(iter(stream)).choices[0].text
    os.killpg(served.process.pid, signal.SIGTERM)
    assert text + "".join(event.choices[0].text for event in stream) == expected
    out, err = served.process.communicate(timeout=30)
    assert (served.process.returncode, out) == (-signal.SIGTERM, "")
    assert "Traceback" not in err
    assert KEY not in err + str(served.events)
    assert eventually(lambda: not served.engine_runs)


def test_the_engine_ends_with_its_server(served):
    """Also with one that had no time to say so, while answers were under way."""
    assert served.engine_runs
    long = {"model": "mine", "prompt": "hello", "max_tokens": 200}
    with served.client.completions.create(**long, stream=True) as stream:
        next(iter(stream))
        served.process.kill()
    assert eventually(lambda: not served.engine_runs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exit", "oracle"], "'oracle' is a simulation"),
        (["--exit", "head"], "needs exit heads, and the model has none"),
        (["--threshold", "0.5"], "Options of exit policies without a policy: threshold"),
        (["--api-key", "short"], "at least 8 ASCII characters"),
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
