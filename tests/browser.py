"""A real browser for tests: Chromium without a window, asked over DevTools' pipe. Imported by tests only.

    with Browser() as browser:
        page = browser.open(path, width=1280)
        page.evaluate("document.title"), page.screenshot(path), page.errors, page.requests

The pipe is two file descriptors with a JSON object and a zero byte for each message: no package is needed for it.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
START = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(word), fcntl.F_DUPFD, 10) for word in sys.argv[1:3]]
os.dup2(pipes[0], 3)
os.dup2(pipes[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""  # the browser reads from descriptor 3 and writes to 4; a shell's redirections end at descriptor 9
SCHEME = "prefers-color-scheme"
PATIENCE = 120.0  # seconds for one answer; on one busy core the start alone takes several


def find() -> str | None:
    """The path of a Chromium: of CHROMIUM, or one that is installed; None if there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A Chromium with a profile of its own, which is removed with it."""

    def __init__(self):
        self.profile = tempfile.mkdtemp(prefix="browser-")
        requests_read, self.requests = os.pipe()
        self.answers, answers_write = os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",  # root, as in containers, has none
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={self.profile}",
            "about:blank",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(requests_read), str(answers_write), find(), *flags],
            pass_fds=(requests_read, answers_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(requests_read)
        os.close(answers_write)
        self.number = 0
        self.buffer = b""
        self.events: list[dict] = []
        self.session: str | None = None  # of its one tab

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        os.close(self.requests)
        os.close(self.answers)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def ask(self, method: str, session: str | None = None, **named) -> dict:
        """The result of one DevTools command; events that come before it are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": named}
        if session:
            message["sessionId"] = session
        os.write(self.requests, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _read(self, deadline: float) -> dict:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            data = os.read(self.answers, 1 << 20)
            assert data, "the browser has ended"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> "Page":
        """A file in the one tab, laid out and drawn; what was open before is gone."""
        if self.session is None:
            target = self.ask("Target.createTarget", url="about:blank")["targetId"]
            self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.ask(f"{domain}.enable", self.session)
        page = Page(self, self.session)
        page.ask("Page.navigate", url="about:blank")
        page.wait("document.readyState === 'complete' && location.href === 'about:blank'")
        self.events.clear()
        page.ask("Emulation.setEmulatedMedia", features=[{"name": SCHEME, "value": "dark" if dark else "light"}])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        page.ask("Emulation.setDeviceMetricsOverride", **size)
        page.ask("Page.navigate", url=path.resolve().as_uri())
        page.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        page.settle()
        return page


class Page:
    """What is open in the tab."""

    def __init__(self, browser: Browser, session: str):
        self.browser = browser
        self.session = session

    def ask(self, method: str, **named) -> dict:
        """A DevTools command to this tab."""
        return self.browser.ask(method, self.session, **named)

    def evaluate(self, expression: str):
        """The JSON value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never came true: {expression}"
            time.sleep(0.05)

    def settle(self) -> None:
        """Until two frames have been drawn: observers have been called by then."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def screenshot(self, path: Path, whole: bool = False) -> Path:
        """A PNG of what is in sight, or of the whole page."""
        data = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def _events(self, method: str) -> list[dict]:
        self.evaluate("1")  # what happened before this is answered has been told
        return [event["params"] for event in self.browser.events if event["method"] == method]

    @property
    def errors(self) -> list[str]:
        """What went wrong: exceptions, console errors, refusals by the content security policy."""
        found = [str(one["exceptionDetails"]) for one in self._events("Runtime.exceptionThrown")]
        found += [str(one["args"]) for one in self._events("Runtime.consoleAPICalled") if one["type"] == "error"]
        return found + [str(one["entry"]) for one in self._events("Log.entryAdded") if one["entry"]["level"] == "error"]

    @property
    def requests(self) -> list[str]:
        """The addresses that were asked for, the file's own first; without those that the page's policy refused."""
        refused = {
            one["requestId"] for one in self._events("Network.loadingFailed") if one.get("blockedReason") == "csp"
        }
        asked = {one["requestId"]: one["request"]["url"] for one in self._events("Network.requestWillBeSent")}
        return [address for number, address in asked.items() if number not in refused]
