"""A small S3 server on loopback, which counts and refuses."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_BUCKET = "models"
_MODIFIED = "Thu, 01 Jan 2026 00:00:00 GMT"


@dataclass
class Store:
    """A folder that is served as the bucket ``models``.

    Attributes:
        folder: The folder.
        url: The server's address.
        requests: What was asked for, as ``"GET tiny/config.json"`` or ``"LIST tiny/"``.
        sent: How many bytes of each object were sent.
        refused: By the end of a path: the status that is answered instead of the object.
    """

    folder: Path
    url: str = ""
    requests: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    refused: dict[str, int] = field(default_factory=dict)

    def uri(self, path: str = "") -> str:
        """Return the URI of a folder in it, such as ``"s3://anonymous@models/tiny"``."""
        return f"s3://anonymous@{_BUCKET}/{path}".rstrip("/")

    @contextlib.contextmanager
    def serving(self) -> Iterator[Store]:
        """Serve it while the block runs."""
        handler = type("Handler", (_Handler,), {"store": self})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            self.url = f"http://127.0.0.1:{server.server_address[1]}"
            thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        _, _, key = unquote(url.path).lstrip("/").partition("/")
        query = parse_qs(url.query)
        if "list-type" in query:
            prefix = query.get("prefix", [""])[0]
            self.store.requests.append(f"LIST {prefix}")
            self._answer(200, self._listing(prefix), {"Content-Type": "application/xml"})
            return
        self.store.requests.append(f"{self.command} {key}")
        status = next((s for end, s in self.store.refused.items() if key.endswith(end)), 0)
        file = self.store.folder / key
        if status or not file.is_file():
            code = "AccessDenied" if status == 403 else "NoSuchKey" if not status else "Refused"
            self._answer(status or 404, f"<Error><Code>{code}</Code></Error>".encode())
            return
        self._send(key, file.read_bytes())

    do_HEAD = do_GET  # noqa: N815 - as above

    def _send(self, key: str, data: bytes) -> None:
        headers = {"ETag": f'"{_md5(data)}"', "Last-Modified": _MODIFIED, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range", "")
        if not wanted.startswith("bytes="):
            self._answer(200, data, headers, key)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
        self._answer(206, data[begin : end + 1], headers, key)

    def _listing(self, prefix: str) -> bytes:
        files = sorted(path for path in self.store.folder.rglob("*") if path.is_file())
        keys = {path.relative_to(self.store.folder).as_posix(): path for path in files}
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{_md5(path.read_bytes())}&quot;</ETag></Contents>"
            for key, path in keys.items()
            if key.startswith(prefix)
        )
        truncated = "<IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{truncated}{contents}</ListBucketResult>".encode()

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, key: str = ""
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            if key:
                self.store.sent[key] += len(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as above
        """Log nothing: a test has its own account of the requests."""


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
