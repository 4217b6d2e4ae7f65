"""A service on loopback that a function answers for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import s3


@dataclass
class Request:
    """What was asked.

    Attributes:
        path: Without the query, and unquoted.
        query: One value by key.
        body: The bytes that were sent.
        headers: By name, which is not case-sensitive.
    """

    method: str
    path: str
    query: dict[str, str]
    body: bytes
    headers: Any


Answer = Callable[[Request], Any]


@dataclass
class Service:
    """A running service; ``requests`` is what it was asked, as ``"METHOD path"``."""

    url: str
    requests: list[str] = field(default_factory=list)


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[Service]:
    """Serve until the block ends.

    Args:
        answer: Returns bytes, what becomes JSON, or the status of a refusal as a number.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path, query = unquote(url.path), dict(parse_qsl(url.query))
            service.requests.append(f"{self.command} {path}")
            found = answer(Request(self.command, path, query, body, self.headers))
            status = found if isinstance(found, int) else 200
            sent = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: object) -> None:
            """Log nothing: tests read ``Service.requests``."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, s3.answering(server):
        service = Service(f"http://127.0.0.1:{server.server_address[1]}")
        yield service
