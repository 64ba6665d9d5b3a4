"""A headless Chromium, driven through its debugging pipe, which needs no further package."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage")


class Page:
    """A page of a browser.

    Args:
        commands: File descriptor to write commands to.
        replies: File descriptor to read replies from.

    Attributes:
        complaints: Errors and warnings of the console, and exceptions of scripts.
    """

    def __init__(self, commands: int, replies: int) -> None:
        self._commands, self._replies, self._buffer = commands, replies, b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command, and wait for its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (reply := self._read()).get("id") != number:
            self._note(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def open(self, url: str) -> None:
        """Open ``url``, and wait until the page has loaded."""
        self.call("Page.navigate", url=url)
        while self._note(self._read()) != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """Evaluate ``script``, an expression, and wait for its promise if it is one."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until the expression ``condition`` is true."""
        ask = f"new Promise(done => {{ const look = () => ({condition}) ? done(true) : setTimeout(look, 20); look() }})"
        assert self.run(ask)

    def screenshot(self, file: Path, width: int = 1100, height: int = 720) -> None:
        """Write a screenshot at twice the resolution."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = os.read(self._replies, 2**16)
            assert more, "the browser has gone"
            self._buffer += more
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> str | None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(params["args"]))
        return method


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """Start a browser, and open a page."""
    assert CHROMIUM is not None
    pipes = [*os.pipe(), *os.pipe()]
    # The browser reads from 3 and writes to 4; the duplicates must have other numbers.
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (pipes[0], pipes[3])]

    def place() -> None:
        for number, fd in zip((3, 4), theirs, strict=True):
            os.dup2(fd, number)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={home}", "--remote-debugging-pipe"],
            preexec_fn=place,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": home, "TMPDIR": home},
        )
        try:
            yield Page(pipes[1], pipes[2])
        finally:
            process.kill()
            process.wait()
            for fd in (*pipes, *theirs):
                os.close(fd)
