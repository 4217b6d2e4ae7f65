"""An S3 server on loopback that counts, paces and misbehaves: ``python tests/s3.py FOLDER``.

Google's XML API differs from S3's in nothing that is asked here; of Azure's there is the listing.

The first folder level below the root are the buckets. It checks no signatures, takes no uploads,
and speaks HTTP by hand: ``http.server`` alone takes longer for a request than the whole client.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import gzip
import hashlib
import os
import socket
import socketserver
import ssl
import stat
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

SO_MAX_PACING_RATE = 47
MODIFIED = "Thu, 01 Jan 2026 00:00:00 GMT"
REASONS = {200: "OK", 206: "Partial Content", 307: "Temporary Redirect"}


@dataclass
class Fault:
    """What to do to the requests for paths that end with ``path``.

    Args:
        kind: ``denied``, ``missing``, ``busy`` (503), ``throttled`` (429), ``truncated`` (half of
            the body, then the end), ``short`` (one byte less than listed, said so), ``reset`` (half
            of the body, then RST), ``corrupt`` (one byte flipped), ``slow`` (``delay_s`` first),
            ``hang up`` (after the answer), ``error`` (``status`` and ``code``), ``silent`` (no
            answer), ``held`` (none until ``released``), ``stall`` (half of the body, then nothing),
            ``trickle`` (a byte each ``delay_s``), ``other`` (another ETag, whatever ``If-Match``
            says), ``bare`` (no ETag, likewise), ``gzip`` (encoded), ``unmeasured`` (a length that
            is no number), ``excess`` (in chunks, a byte more than listed) or ``redirect`` (307 to
            ``to``).
        path: The end of the request's path; everything ends with the empty string.
        times: How many requests it hits.
        method: The HTTP method it hits.
        delay_s: For ``slow``.
        start: The first byte of the range it hits; None hits each.
        status: Of ``error``.
        code: Of ``error``.
        to: The server of ``redirect``.
    """

    kind: str
    path: str = ""
    times: float = float("inf")
    method: str = "GET"
    delay_s: float = 0.0
    start: int | None = None
    status: int = 403
    code: str = "AccessDenied"
    to: str = ""


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]

    @property
    def first_byte(self) -> int:
        return int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])


@dataclass
class Server:
    """The state of a running server; tests change it while it runs.

    Attributes:
        root: The folder above the buckets.
        url: Where it listens.
        etags: ``md5``, ``multipart`` (as of an upload in parts), ``opaque`` (no hash at all),
            ``empty`` (two quotes).
        checksums: By path: the headers that a HEAD with ``x-amz-checksum-mode``, or one of another
            store's client, adds.
        crc64: Add the true CRC64NVME of every object to those.
        page_size: Objects in one page of a listing.
        region: The bucket's region, which signatures have to name.
        sizes: By path: what a listing says instead of the size.
        keys: What a listing has besides the files, all of them empty.
        repeats: A listing's pages never end: ``token`` (each has the token of the one before) or
            ``cycle`` (the last one leads to the first).
        empty_pages: How many pages of a listing are empty before the first object.
        all_keys: A listing has all of a bucket, whatever prefix is asked for.
        listed_etags: A listing has ETags.
        virtual: The bucket is the first label of the host, and not in the path.
        rate: Bytes per second and connection.
        first_byte_s: Delay of each answer.
        faults: What goes wrong.
        requests: ``"METHOD path"`` of each request; a listing is ``"LIST prefix"``.
        heads: The headers of each HEAD, with names in lower case.
        headers: The same of every request.
        sent: Body bytes of objects, by path.
        connections: How many clients have opened.
        tls: Speak HTTPS.
    """

    root: Path
    url: str = ""
    etags: str = "md5"
    checksums: dict[str, dict[str, str]] = field(default_factory=dict)
    crc64: bool = False
    page_size: int = 1000
    region: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    repeats: str = ""
    empty_pages: float = 0
    all_keys: bool = False
    listed_etags: bool = True
    virtual: bool = False
    released: threading.Event = field(default_factory=threading.Event)
    rate: int | None = None
    first_byte_s: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    heads: list[dict[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    tls: ssl.SSLContext | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    answering: int = 0
    idle: threading.Condition = field(default_factory=threading.Condition)
    md5s: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def count(self, start: str) -> int:
        """Count the requests that start with a text."""
        return sum(request.startswith(start) for request in self.requests)

    def sent_of(self, path: str) -> int:
        """Return the body bytes of an object, once all answers have ended and been counted."""
        self.settle()
        return self.sent[path]

    def settle(self) -> None:
        """Wait until all answers have ended and been counted."""
        with self.idle:
            assert self.idle.wait_for(lambda: self.answering == 0, timeout=10)

    def forget(self) -> None:
        """Set the counters to zero, once the answers to clients that are gone have ended."""
        self.settle()
        self.requests.clear()
        self.sent.clear()

    def fault(self, request: Request) -> Fault | None:
        if not self.faults:
            return None
        with self.lock:
            for fault in self.faults:
                if (
                    fault.times > 0
                    and fault.method == request.method
                    and request.path.endswith(fault.path)
                    and fault.start in (None, request.first_byte)
                ):
                    fault.times -= 1
                    return fault
        return None

    def etag(self, file: str | Path) -> str:
        return self.etag_of(file, os.stat(file))

    def etag_of(self, file: str | Path, status: os.stat_result) -> str:
        if self.etags == "empty":
            return ""
        if self.etags == "opaque":
            return f"version-{status.st_mtime_ns:x}"
        key = (str(file), status.st_size, status.st_mtime_ns)
        if key not in self.md5s:
            with open(file, "rb") as opened:
                self.md5s[key] = hashlib.file_digest(opened, "md5").hexdigest()
        return self.md5s[key] + ("-2" if self.etags == "multipart" else "")


class _Handler(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True
    server: _TCPServer

    def setup(self) -> None:
        super().setup()
        self.s3 = self.server.s3
        self.s3.connections += 1
        if self.s3.rate:
            self.connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, self.s3.rate)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            while (request := self._read()) is not None and self._counted(request):
                pass

    def _counted(self, request: Request) -> bool:
        with self.s3.idle:
            self.s3.answering += 1
        try:
            return self._answer(request)
        finally:
            with self.s3.idle:
                self.s3.answering -= 1
                self.s3.idle.notify_all()

    def _read(self) -> Request | None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):  # nobody sends a body, or a request ahead
            received = self.connection.recv(65536)
            if not received:
                return None
            head += received
        line, *lines = head.decode("latin-1").split("\r\n")[:-2]
        method, target, _ = line.split(" ", 2)
        headers = {}
        for header in lines:
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        path, _, query = target.partition("?")
        if self.s3.virtual:
            path = f"/{headers['host'].partition('.')[0]}{path}"
        parsed = parse_qs(query, keep_blank_values=True) if query else {}
        return Request(method, unquote(path).lstrip("/"), parsed, headers)

    def _answer(self, request: Request) -> bool:
        """Answer one request; tell whether the connection can go on."""
        azure = request.query.get("comp") == ["list"]
        listing = azure or "list-type" in request.query
        prefix = request.query.get("prefix", [""])[0]
        self.s3.requests.append(f"LIST {prefix}" if listing else f"{request.method} {request.path}")
        self.s3.headers.append(request.headers)
        fault = self.s3.fault(request)
        scope = request.headers.get("authorization", "").split("/")
        if self.s3.region and len(scope) > 2 and scope[2] != self.s3.region:
            return self._wrong_region(head=request.method == "HEAD")
        if self.s3.first_byte_s:
            time.sleep(self.s3.first_byte_s)
        if fault is not None:
            if fault.kind == "silent":
                self.s3.released.wait()
                return False
            if fault.kind == "held":
                self.s3.released.wait()
            if fault.kind == "redirect":
                location = f"{fault.to}/{request.path}"
                return self._send(307, {"Location": location, "Content-Length": "0"}, b"")
            if fault.kind != "trickle":
                time.sleep(fault.delay_s)
            errors = {
                "error": (fault.status, fault.code, "Said by the store."),
                "denied": (403, "AccessDenied", "Access Denied"),
                "missing": (404, "NoSuchKey", "The specified key does not exist."),
                "busy": (503, "SlowDown", "Please reduce your request rate."),
                "throttled": (429, "TooManyRequests", "Please reduce your request rate."),
            }
            if fault.kind in errors:
                return self._error(*errors[fault.kind], head=request.method == "HEAD")
        if listing:
            found = self._list_azure if azure else self._list
            return found(request.path.rstrip("/"), prefix, request.query)
        return self._object(request, fault)

    def _list(self, bucket: str, prefix: str, query: dict[str, list[str]]) -> bool:
        folder = self.s3.root / bucket
        if not folder.is_dir():
            return self._error(404, "NoSuchBucket", "The specified bucket does not exist")
        keys = self._keys(folder, "" if self.s3.all_keys else prefix)
        token = query.get("continuation-token", ["0"])[0]
        before = int(token.removeprefix("empty-")) if token.startswith("empty-") else 0
        if (token == "0" and self.s3.empty_pages) or 0 < before < self.s3.empty_pages:
            text = (
                "<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>"
                f"empty-{before + 1}</NextContinuationToken></ListBucketResult>"
            )
            return self._send(200, {"Content-Type": "application/xml"}, text.encode())
        token = "0" if before else token
        first = 0 if token == "again" else int(token)
        size = min(self.s3.page_size, int(query.get("max-keys", ["1000"])[0]))
        page = keys[first : first + size]
        last = first + len(page)
        next_token = str(last) if last < len(keys) else ""
        if self.s3.repeats:
            next_token = "again" if self.s3.repeats == "token" else str(last % len(keys))
        more = f"<NextContinuationToken>{next_token}</NextContinuationToken>" if next_token else ""
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"{f'<ETag>&quot;{etag}&quot;</ETag>' if self.s3.listed_etags else ''}</Contents>"
            for key, size, etag in self._described(folder, page)
        )
        truncated = f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>"
        truncated += f"<KeyCount>{len(page)}</KeyCount>"
        text = f"<ListBucketResult>{truncated}{more}{contents}</ListBucketResult>"
        return self._send(200, {"Content-Type": "application/xml"}, text.encode())

    def _keys(self, folder: Path, prefix: str) -> list[str]:
        above = len(f"{folder}/")
        files = (f"{parent}/{name}" for parent, _, names in os.walk(folder) for name in names)
        found = {key for file in files if (key := file[above:]).startswith(prefix)}
        return sorted(found | {key for key in self.s3.keys if key.startswith(prefix)})

    def _described(self, folder: Path, keys: list[str]) -> Iterator[tuple[str, int, str]]:
        for key in keys:
            if key in self.s3.keys:
                yield key, 0, hashlib.md5(b"", usedforsecurity=False).hexdigest()
                continue
            file = f"{folder}/{key}"
            status = os.stat(file)
            size = self.s3.sizes.get(f"{folder.name}/{key}", status.st_size)
            yield key, size, self.s3.etag_of(file, status)

    def _list_azure(self, container: str, prefix: str, query: dict[str, list[str]]) -> bool:
        folder = self.s3.root / container
        keys = self._keys(folder, prefix)
        first = int(query.get("marker", ["0"])[0])
        last = first + self.s3.page_size
        blobs = "".join(
            f"<Blob><Name>{escape(key)}</Name><Properties><Last-Modified>{MODIFIED}</Last-Modified>"
            f"<Etag>{etag}</Etag><Content-Length>{size}</Content-Length>"
            "<Content-Type>application/octet-stream</Content-Type></Properties></Blob>"
            for key, size, etag in self._described(folder, keys[first:last])
        )
        marker = f"<NextMarker>{last if last < len(keys) else ''}</NextMarker>"
        text = f"<EnumerationResults><Blobs>{blobs}</Blobs>{marker}</EnumerationResults>"
        return self._send(200, {"Content-Type": "application/xml"}, text.encode())

    def _object(self, request: Request, fault: Fault | None) -> bool:
        file = f"{self.s3.root}/{request.path}"
        try:
            status = os.stat(file)
        except OSError:
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            return self._error(
                404,
                "NoSuchKey",
                "The specified key does not exist.",
                head=request.method == "HEAD",
            )
        etag, size = f'"{self.s3.etag_of(file, status)}"', status.st_size
        ignores = fault is not None and fault.kind in ("other", "bare")
        if fault is not None and fault.kind == "other":
            etag = '"other"'
        if request.headers.get("if-match", etag).strip('"') != etag.strip('"') and not ignores:
            return self._error(
                412, "PreconditionFailed", "At least one of the pre-conditions did not hold"
            )
        headers = {"ETag": etag, "Last-Modified": MODIFIED, "Accept-Ranges": "bytes"}
        if fault is not None and fault.kind == "bare":
            headers = {}
        if request.method == "HEAD":
            self.s3.heads.append(request.headers)
            if request.headers.get("x-amz-checksum-mode") or request.path in self.s3.checksums:
                headers |= self._checksums(request.path, Path(file))
            return self._send(200, headers | {"Content-Length": str(size)}, b"")
        start, end = 0, size
        if wanted := request.headers.get("range"):
            last = wanted.rpartition("-")[2]
            start, end = request.first_byte, min(int(last or size) + 1, size)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        code = 206 if wanted else 200
        if fault is not None and fault.kind == "short":
            end -= 1
        with open(file, "rb", buffering=0) as opened:
            return self._body(request, code, headers, (opened, start, end), fault)

    def _body(
        self,
        request: Request,
        status: int,
        headers: dict[str, str],
        span: tuple[FileIO, int, int],
        fault: Fault | None,
    ) -> bool:
        opened, start, end = span
        headers["Content-Length"] = str(end - start)
        kind = fault.kind if fault else ""
        if kind == "corrupt":
            opened.seek(start)
            body = bytearray(opened.read(end - start))
            body[len(body) // 2] ^= 1
            self._account(request.path, len(body))
            return self._send(status, headers, bytes(body))
        if kind == "gzip":
            opened.seek(start)
            body = bytearray(gzip.compress(opened.read(end - start)))
            headers |= {"Content-Encoding": "gzip", "Content-Length": str(len(body))}
            return self._send(status, headers, bytes(body))
        if kind == "excess":
            opened.seek(start)
            content = bytes(opened.read(end - start)) + b"!"
            headers |= {"Transfer-Encoding": "chunked"}
            del headers["Content-Length"]
            self._send(status, headers, None)
            self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content))
            return True
        if kind == "unmeasured":
            headers["Content-Length"] = f"{end - start}, {end - start}"
        self._send(status, headers, None)
        if kind == "trickle":
            opened.seek(start)
            for byte in opened.read(end - start):
                self.wfile.write(bytes([byte]))
                if self.s3.released.wait(fault.delay_s if fault else 0):
                    return False
            return True
        stop = start + (end - start) // 2 if kind in ("truncated", "reset", "stall") else end
        offset = start
        while offset < stop:
            sent = self._send_file(opened, offset, stop - offset)
            self._account(request.path, sent)
            offset += sent
        if kind == "stall":
            self.s3.released.wait()
        if kind == "reset":
            # The client reads what it has been sent before the RST throws the rest away.
            time.sleep(0.02)
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return stop == end and kind not in ("hang up", "unmeasured")

    def _send_file(self, opened: FileIO, offset: int, count: int) -> int:
        if isinstance(self.connection, ssl.SSLSocket):
            return self.connection.sendfile(opened, offset, count)
        return os.sendfile(self.connection.fileno(), opened.fileno(), offset, count)

    def _account(self, path: str, sent: int) -> None:
        with self.s3.lock:
            self.s3.sent[path] += sent

    def _checksums(self, path: str, file: Path) -> dict[str, str]:
        if path in self.s3.checksums:
            return self.s3.checksums[path]
        return crc64_headers(file.read_bytes()) if self.s3.crc64 else {}

    def _wrong_region(self, *, head: bool) -> bool:
        text = (
            "<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region is wrong"
            f"</Message><Region>{self.s3.region}</Region></Error>"
        ).encode()
        headers = {"x-amz-bucket-region": self.s3.region, "Content-Length": str(len(text))}
        return self._send(400, headers, b"" if head else text)

    def _error(self, status: int, code: str, message: str, *, head: bool = False) -> bool:
        text = (
            f"<Error><Code>{code}</Code><Message>{message}</Message>"
            "<AWSAccessKeyId>AKIASECRET</AWSAccessKeyId></Error>"
        ).encode()
        headers = {"Content-Type": "application/xml", "Content-Length": str(len(text))}
        return self._send(status, headers, b"" if head else text)

    def _send(self, status: int, headers: dict[str, str], body: bytes | None) -> bool:
        if body and "Content-Length" not in headers:
            headers = headers | {"Content-Length": str(len(body))}
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.wfile.write("\r\n".join([*lines, "\r\n"]).encode() + (body or b""))
        return True


class _TCPServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    s3: Server

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        if self.s3.tls is not None:  # the handshake is left to the handler's thread
            connection = self.s3.tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def handle_error(self, request: object, client_address: object) -> None:
        """Log nothing: a client that was killed is what many tests are about."""


def crc64_headers(data: bytes) -> dict[str, str]:
    """Return the headers of a HEAD for the full object's CRC64NVME."""
    from awscrt.checksums import crc64nvme

    value = base64.b64encode(crc64nvme(data).to_bytes(8, "big")).decode()
    return {"x-amz-checksum-crc64nvme": value, "x-amz-checksum-type": "FULL_OBJECT"}


@contextlib.contextmanager
def serving(root: Path, port: int = 0, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """Serve the buckets below ``root`` until the block ends."""
    with _TCPServer(("127.0.0.1", port), _Handler) as tcp:
        url = f"{'https' if tls else 'http'}://127.0.0.1:{tcp.server_address[1]}"
        tcp.s3 = Server(root, url, tls=tls)
        with answering(tcp):
            try:
                yield tcp.s3
            finally:
                tcp.s3.released.set()


@contextlib.contextmanager
def answering(server: socketserver.BaseServer) -> Iterator[None]:
    """Let a server answer until the block ends."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=int, default=90_000_000)
    parser.add_argument("--first-byte", type=float, default=0.025)
    parser.add_argument("--crc64", action="store_true")
    arguments = parser.parse_args()
    with serving(arguments.root, arguments.port) as server:
        server.rate, server.first_byte_s = arguments.rate, arguments.first_byte
        server.crc64 = arguments.crc64
        for file in arguments.root.rglob("*"):
            if file.is_file():
                server.etag(file)
                if arguments.crc64:
                    path = file.relative_to(arguments.root).as_posix()
                    server.checksums[path] = crc64_headers(file.read_bytes())
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
