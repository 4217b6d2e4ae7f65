"""A small S3 server on loopback: lists and serves the files below a folder, with ranges.

The first folder level are the buckets. It checks no signatures and takes no uploads.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape


class S3Server(ThreadingHTTPServer):
    """Serve ``root``; ``requests`` records each request as ``"METHOD path"``."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3Server

    def do_HEAD(self) -> None:
        self._object(with_body=False)

    def do_GET(self) -> None:
        if "list-type" in parse_qs(urlsplit(self.path).query):
            self._list()
        else:
            self._object(with_body=True)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        self.server.requests.append(f"{self.command} {unquote(urlsplit(self.path).path)}")

    def _list(self) -> None:
        bucket = unquote(urlsplit(self.path).path).strip("/")
        prefix = parse_qs(urlsplit(self.path).query).get("prefix", [""])[0]
        folder = self.server.root / bucket
        if not folder.is_dir():
            self._error(404, "NoSuchBucket")
            return
        keys = sorted(
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        )
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{(folder / key).stat().st_size}</Size>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{quote(key)}</ETag>"
            "</Contents>"
            for key in keys
            if key.startswith(prefix)
        )
        self._send(200, _xml("ListBucketResult", f"<IsTruncated>false</IsTruncated>{contents}"))

    def _object(self, *, with_body: bool) -> None:
        path = self.server.root / unquote(urlsplit(self.path).path).lstrip("/")
        if not path.is_file():
            self._error(404, "NoSuchKey")
            return
        size = path.stat().st_size
        start, end = 0, size - 1
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or end), end)
        with path.open("rb") as file:
            file.seek(start)
            body = file.read(end - start + 1)
        headers = {
            "ETag": f'"{quote(path.name)}"',
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
        }
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        self._send(206 if wanted else 200, body, headers, with_body=with_body)

    def _error(self, status: int, code: str) -> None:
        self._send(status, _xml("Error", f"<Code>{code}</Code>"))

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        with_body: bool = True,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body and self.command != "HEAD":
            self.wfile.write(body)


def _xml(tag: str, content: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?><{tag}>{content}</{tag}>'.encode()


@contextmanager
def s3_server(root: Path) -> Iterator[S3Server]:
    """Serve ``root`` until the block ends."""
    with S3Server(root) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
