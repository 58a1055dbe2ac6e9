"""A stand-in for the head's dashboard: answers what a test tells it to and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ray


@dataclass
class Dashboard:
    """What it answers.

    Attributes:
        url: Its address.
        ray_version: Of the cluster.
        python_version: Of the cluster.
        token: That is asked for; None: none.
        html: Whether it is some other web server.
        moved: Address that it sends everybody to.
        seen: (method, path) of all requests, in order.
        refusing: What it says of the next jobs that are submitted, one after the other.
        submitted: Bodies of submitted jobs.
        uploaded: Bytes by package.
    """

    url: str = ""
    ray_version: str = ray.__version__
    python_version: str = "3.11.7"
    token: str | None = None
    html: bool = False
    moved: str | None = None
    seen: list[tuple[str, str]] = field(default_factory=list)
    refusing: list[str] = field(default_factory=list)
    submitted: list[dict[str, Any]] = field(default_factory=list)
    uploaded: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def dashboard(**words: Any) -> Iterator[Dashboard]:
    """One that is up while the block runs."""
    board = Dashboard(**words)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            return

        def _say(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _handle(self) -> None:
            board.seen.append((self.command, self.path))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            given = self.headers.get("Authorization", "")
            if board.moved is not None:
                self.send_response(302)
                self.send_header("Location", board.moved + self.path)
                self.end_headers()
                return
            if board.html:
                self._say(200, b"<html>hello</html>")
            elif board.token is not None and not given:
                self._say(401, b"Unauthorized: Missing authentication token")
            elif board.token is not None and given != f"Bearer {board.token}":
                self._say(403, b"Forbidden: Invalid authentication token")
            elif self.path == "/api/version":
                self._json({"version": "4", "ray_version": board.ray_version, "ray_commit": "x", "session_name": "s"})
            elif self.path == "/api/v0/cluster_metadata":
                self._json({"data": {"rayVersion": board.ray_version, "pythonVersion": board.python_version}})
            elif self.path.startswith("/api/packages/"):
                name = self.path.rpartition("/")[2]
                if self.command == "PUT":
                    board.uploaded[name] = body
                self._say(200 if name in board.uploaded else 404, b"{}")
            elif self.path == "/api/jobs/" and self.command == "POST":
                if board.refusing:
                    self._say(500, board.refusing.pop(0).encode())
                    return
                board.submitted.append(json.loads(body))
                self._json({"job_id": "1", "submission_id": board.submitted[-1]["submission_id"]})
            else:
                self._say(404, b"no such job")

        def _json(self, value: Any) -> None:
            self._say(200, json.dumps(value).encode())

        do_GET = do_PUT = do_POST = _handle

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    board.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
