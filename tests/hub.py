"""A Hugging Face Hub on loopback, for the requests that ``huggingface_hub`` makes of one model.

Paths, headers and error codes are those that its client asks for (``hf_api.py``,
``file_download.py`` and ``utils/_http.py`` of huggingface_hub 2.4).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import s3

COMMIT = "1" * 40


@dataclass
class Hub:
    """The state of a running server.

    Attributes:
        root: The folder above the models' own.
        url: Where it listens.
        token: What a client has to send; None if everybody may read.
        requests: ``"METHOD path"`` of each request.
    """

    root: Path
    url: str = ""
    token: str | None = None
    requests: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server.hub
        path = unquote(self.path.partition("?")[0])
        hub.requests.append(f"{self.command} {path}")
        asked = re.fullmatch(
            r"/(?:api/models/)?(?P<model>[^/]+/[^/]+)/(?P<what>revision|tree|resolve)/"
            r"(?P<revision>[^/]+)(?:/(?P<file>.+))?",
            path,
        )
        if hub.token is not None and self.headers["Authorization"] != f"Bearer {hub.token}":
            self._refuse(401, "", "Invalid username or password.")
        elif asked is None or not (folder := hub.root / asked["model"]).is_dir():
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif asked["what"] == "revision":
            self._send(json.dumps({"id": asked["model"], "sha": COMMIT}).encode())
        elif asked["what"] == "tree":
            self._send(json.dumps([_described(folder, file) for file in _files(folder)]).encode())
        elif not (file := folder / str(asked["file"])).is_file():
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            self._send(file.read_bytes(), {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT})

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(json.dumps({"error": message}).encode(), headers, status)

    def _send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing: tests read ``Hub.requests``."""


class _Server(ThreadingHTTPServer):
    hub: Hub


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _described(folder: Path, file: Path) -> dict[str, object]:
    path, size = file.relative_to(folder).as_posix(), file.stat().st_size
    return {"type": "file", "path": path, "size": size, "oid": _oid(file)}


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """Serve the models below ``root``, ``<organization>/<name>`` each, until the block ends."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.hub = Hub(root, f"http://127.0.0.1:{server.server_address[1]}")
        with s3.answering(server):
            yield server.hub
