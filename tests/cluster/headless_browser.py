"""A real headless browser for tests: chromium by chromedriver, spoken to in the W3C WebDriver protocol."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # how the protocol names a reference to an element


def found() -> tuple[str, str] | None:
    """Paths of chromedriver and a Chromium; None where there are none."""
    driver = shutil.which("chromedriver")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return (driver, browser) if driver and browser else None


class Browser:
    """One window."""

    def __init__(self, session: str) -> None:
        self._session = session

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self._session + path, data, {"content-type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def open(self, address: str) -> None:
        self.ask("POST", "/url", {"url": address})

    def element(self, selector: str) -> str:
        reference = self.ask("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]
        return f"/element/{reference}"

    def text(self, selector: str) -> str:
        return str(self.ask("GET", f"{self.element(selector)}/text"))

    def type(self, selector: str, text: str) -> None:
        self.ask("POST", f"{self.element(selector)}/value", {"text": text})

    def click(self, selector: str) -> None:
        self.ask("POST", f"{self.element(selector)}/click")

    def run(self, script: str) -> Any:
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def wait(self, script: str, seconds: float = 30.0) -> Any:
        """Until a script returns something true."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if value := self.run(script):
                return value
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds} s: {script}; the page says {self.text('body')!r}")

    def errors(self) -> list[str]:
        """What the console holds of errors."""
        return [
            line["message"] for line in self.ask("POST", "/se/log", {"type": "browser"}) if line["level"] == "SEVERE"
        ]


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own."""
    paths = found()
    assert paths is not None
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port = tried.getsockname()[1]
    driver = subprocess.Popen([paths[0], f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    options = {
        "binary": paths[1],
        "args": [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            f"--user-data-dir={folder}",
        ],
    }
    wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
    try:
        until = time.monotonic() + 30
        while True:
            try:
                session = Browser(address).ask("POST", "/session", {"capabilities": wanted})["sessionId"]
                break
            except urllib.error.HTTPError as error:
                raise AssertionError(error.read().decode()) from None
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)
        browser = Browser(f"{address}/session/{session}")
        try:
            yield browser
        finally:
            browser.ask("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(10)
