"""Ranges of objects, resumed where they break off; and the HTTP client that reads those of S3.

The standard library's client reads from the socket into the buffer that is written: clients that
copy each chunk took 25 % longer where the CPU is the bottleneck, see ``docs/decisions.md``. It asks
what it is handed and follows no redirect; it knows neither credentials nor stores.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import random
import re
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rayserve_hooks.download import settings
from rayserve_hooks.download.settings import Proxy
from rayserve_hooks.download.store_errors import failure
from rayserve_hooks.errors import DownloadError, describe

if TYPE_CHECKING:
    import ssl

Span = tuple[int, int]
Parts = Generator[memoryview, None, None]

CONNECT_S = 5.0
# How often a read looks whether the download has ended meanwhile.
_POLL_S = 1.0
# Each buffer costs a thread a few acquisitions of the GIL, so larger is better, up to the point
# where the kernel takes longer to find contiguous memory for the page cache.
_BUFFER_BYTES = 3 * 2**17
# Of the buffer that answers' heads go through.
_HEAD_BYTES = 2**14
# A part is handed on after this time, also if the buffer is not full: for progress and cancelling.
_PART_S = 0.5
_TEXT_BYTES = 64 * 2**20

# Tries in a row that bring less than this count as failures.
_PROGRESS_BYTES = 2**20
STALLS = 3
BREAKS = 6
BUSY = 10  # with the back-off about a minute
BACKOFF_S = 0.2
_LONGEST_S = 15.0


class AnswerError(Exception):
    """A request failed, or its answer is not what was asked for.

    Attributes:
        status: The answer's, 0 without one.
        code: The store's word for it, if any.
        tries: How often in a row this may happen before it is the download's failure.
    """

    def __init__(self, text: str, *, status: int = 0, code: str = "", tries: int = 1) -> None:
        super().__init__(text)
        self.status, self.code, self.tries = status, code, tries


class StalledError(AnswerError):
    """No bytes, or too few, for too long."""


def resumed(
    what: str, span: Span, body: Callable[[Span], Iterator[memoryview]], stopped: threading.Event
) -> Parts:
    """Yield a range's bytes in order; repeat and resume what may pass.

    Args:
        what: What cannot be done if it fails, for the error.
        span: The range.
        body: Yields the bytes of the rest of the range, or raises an `AnswerError`.
        stopped: Set to end the waiting.

    Raises:
        DownloadError: It failed for good.
    """
    start, end = span
    began, reached = time.monotonic(), start
    failures = 0
    while start < end:
        problem: AnswerError | None = None
        try:
            with contextlib.closing(body((start, end))) as parts:  # type: ignore[type-var]
                for part in parts:
                    view = part[: end - start]  # excess bytes would belong to another range
                    start += len(view)
                    yield view
        except AnswerError as error:
            problem = error
        if start == end:
            return
        problem = problem or AnswerError("the body ended early", tries=BREAKS)
        if start - reached >= _PROGRESS_BYTES:
            failures, reached = 0, start
        failures += 1
        if failures >= problem.tries or stopped.is_set():
            if problem.tries == 1:
                raise failure(what, problem) from problem
            got, seconds = start - span[0], time.monotonic() - began
            detail = f"{problem}; {got:,} of {end - span[0]:,} bytes in {seconds:.1f} s"
            times = f", {failures} times" if failures > 1 else ""
            if isinstance(problem, StalledError):
                raise DownloadError(
                    f"{what}: {detail}{times}; look for what stalls, the store, a proxy or the "
                    f"network, or set {settings.STALL_VARIABLE} to wait longer"
                ) from problem
            if problem.status == 0 and problem.tries == BREAKS and got:
                raise DownloadError(
                    f"{what}: {detail}{times}; the store or a proxy cuts it off, or lists another "
                    "size: check both"
                ) from problem
            raise failure(f"{what}, asked {failures} times", problem) from problem
        wait_s = min(BACKOFF_S * 2**failures, _LONGEST_S)
        stopped.wait(random.uniform(0.5, 1) * wait_s)


class _Wire(io.RawIOBase):
    """A socket as a file, of which every read is under the rule for stalls."""

    def __init__(self, sock: socket.socket, limit_s: float, stopped: threading.Event) -> None:
        self._sock, self._limit_s, self._stopped = sock, limit_s, stopped
        # Keeps the socket open where the connection is closed before its last body is read.
        self._file = sock.makefile("rb", buffering=0)
        # Let the kernel fill a large buffer: one call, where there would be one for each packet or
        # two. Set for a body of known length, so that it never waits for what is not to come.
        self.fills = False
        self._can_fill = sock.gettimeout() is None
        self._longest_s = sock.gettimeout() or _POLL_S
        self._waited, self._received = 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while True:
            before = time.monotonic()
            count = None
            flags = 0
            if self.fills and self._can_fill and len(buffer) > _HEAD_BYTES:
                flags = socket.MSG_WAITALL
            with contextlib.suppress(TimeoutError, BlockingIOError):
                count = self._sock.recv_into(buffer, 0, flags)
            # The time in which the reader is busy elsewhere is not the sender's, nor is that by
            # which a read is longer than its timeout: the machine was too busy for this thread.
            self._waited += min(time.monotonic() - before, self._longest_s)
            self._received += count or 0
            if self._stopped.is_set():
                raise AnswerError("the download has ended")
            if self._waited >= self._limit_s:
                if self._received < self._limit_s * settings.LEAST_RATE and count != 0:
                    raise StalledError(
                        f"{self._received:,} bytes came in {self._waited:.1f} s", tries=STALLS
                    )
                self._waited, self._received = 0.0, 0
            if count is not None:
                return count

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass
class _Connection:
    http: http.client.HTTPConnection
    buffer: memoryview
    used: bool = False


class Pool:
    """Connections that are kept, to any host, in any number of threads."""

    def __init__(
        self, tls: Callable[[], ssl.SSLContext], proxy: Callable[[str], Proxy | None]
    ) -> None:
        self._tls, self._proxy = tls, proxy
        self._idle: dict[tuple[str, ...], deque[_Connection]] = defaultdict(deque)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the idle connections."""
        for idle in list(self._idle.values()):
            with contextlib.suppress(IndexError):
                while True:
                    idle.pop().http.close()

    def text(
        self, method: str, url: str, headers: Mapping[str, str], stopped: threading.Event
    ) -> tuple[int, Any, bytes]:
        """Return status, headers and body of a short answer, whatever it is."""
        limit_s = min(settings.stall_s(), 10.0)
        with self.exchange(method, url, headers, stopped, limit_s) as (response, _):
            return response.status, response.headers, short_body(response)

    @contextlib.contextmanager
    def exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        stopped: threading.Event,
        limit_s: float | None = None,
    ) -> Iterator[tuple[http.client.HTTPResponse, memoryview]]:
        """Send a request; the connection is kept if the block closes the response.

        Raises:
            AnswerError: There is no answer, or it breaks off in the block.
        """
        parts = urlsplit(url)
        proxy = self._proxy(url)
        target = url.partition("://")[2][len(parts.netloc) :]
        target = target if target.startswith("/") else f"/{target}"
        sent = dict(headers)
        if proxy is not None and parts.scheme == "http":
            target = f"http://{parts.netloc}{target}"
            sent |= proxy.headers
        key = (parts.scheme, parts.netloc, proxy.url if proxy else "")
        limit_s = limit_s or settings.stall_s()
        with self._translated(url, proxy):
            connection = self._take(key)
            while True:
                if connection is None:
                    connection = self._connect(parts, proxy, stopped)
                connection.http.response_class = functools.partial(  # type: ignore[assignment]
                    _response, limit_s, stopped
                )
                try:
                    connection.http.request(method, target, headers=sent)
                    response = connection.http.getresponse()
                    break
                except (ConnectionError, http.client.BadStatusLine):
                    connection.http.close()
                    if not connection.used:
                        raise
                    connection = None  # the server has closed it meanwhile
                except BaseException:
                    connection.http.close()
                    raise
            connection.used = True
            keep = False
            try:
                yield response, connection.buffer
                keep = response.isclosed() and not response.will_close
            finally:
                response.close()
                if keep:
                    self._idle[key].append(connection)
                else:
                    connection.http.close()

    def _take(self, key: tuple[str, ...]) -> _Connection | None:
        with contextlib.suppress(IndexError):
            return self._idle[key].pop()
        return None

    def _connect(self, parts: Any, proxy: Proxy | None, stopped: threading.Event) -> _Connection:
        host, port = (proxy.host, proxy.port) if proxy else (parts.hostname or "", parts.port)
        if parts.scheme == "https" and proxy is not None and proxy.scheme == "https":
            raise AnswerError(
                f"the proxy {proxy.shown!r} is asked with TLS, which is not supported inside of "
                "TLS: write it with http://"
            )
        made: http.client.HTTPConnection
        if "https" in (parts.scheme, proxy.scheme if proxy else ""):
            with self._lock:  # reading all certificates is slow: once, not in each thread
                tls = self._tls()
            made = http.client.HTTPSConnection(host, port, timeout=CONNECT_S, context=tls)
        else:
            made = http.client.HTTPConnection(host, port, timeout=CONNECT_S)
        if parts.scheme == "https" and proxy is not None:
            made.set_tunnel(parts.hostname or "", parts.port or 443, proxy.headers)
        made.response_class = functools.partial(  # type: ignore[assignment]
            _response, CONNECT_S, stopped
        )
        try:
            made.connect()
        except BaseException:
            made.close()
            raise
        if isinstance(made, http.client.HTTPSConnection):
            made.sock.settimeout(_POLL_S)
        else:
            # Not Python's own, with which a call returns what is there, however little.
            made.sock.settimeout(None)
            for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                limit = struct.pack("ll", int(_POLL_S), int(_POLL_S % 1 * 1e6))
                made.sock.setsockopt(socket.SOL_SOCKET, direction, limit)
        return _Connection(made, memoryview(bytearray(_BUFFER_BYTES)))

    @contextlib.contextmanager
    def _translated(self, url: str, proxy: Proxy | None) -> Iterator[None]:
        """Raise what the client raises as an `AnswerError`."""
        import ssl

        through = f"the proxy {proxy.shown!r}: " if proxy else ""
        where = "://".join([urlsplit(url).scheme, urlsplit(url).netloc.rpartition("@")[2]])
        try:
            yield
        except StalledError as error:
            if proxy is None:
                raise
            raise StalledError(f"{through}{error}", tries=error.tries) from error
        except ssl.SSLCertVerificationError as error:
            raise AnswerError(f"{through}{where}: {describe(error)}") from error
        except TimeoutError as error:
            text = f"{through}{where}: no connection within {CONNECT_S:.0f} s"
            raise AnswerError(text, tries=STALLS) from error
        except socket.gaierror as error:
            tries = STALLS if error.errno == socket.EAI_AGAIN else 1
            raise AnswerError(f"{through}{where}: {describe(error)}", tries=tries) from error
        except (OSError, http.client.HTTPException) as error:
            fixed = "Tunnel connection failed: 4" in str(error)
            tries = 1 if fixed else BREAKS
            raise AnswerError(f"{through}{where}: {describe(error)}", tries=tries) from error


class _Timed:
    """What a response needs of a socket."""

    def __init__(self, sock: socket.socket, limit_s: float, stopped: threading.Event) -> None:
        self._wire = _Wire(sock, limit_s, stopped)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self._wire, _HEAD_BYTES)


def _response(
    limit_s: float, stopped: threading.Event, sock: socket.socket, **options: Any
) -> http.client.HTTPResponse:
    timed: Any = _Timed(sock, limit_s, stopped)
    return http.client.HTTPResponse(timed, **options)


def short_body(response: http.client.HTTPResponse, limit: int = _TEXT_BYTES) -> bytes:
    """Return the whole body of an answer that is no object's."""
    data = response.read(limit)
    if response.length or len(data) == limit:
        raise AnswerError(f"the answer has more than {limit:,} bytes, or ended early", tries=BREAKS)
    response.close()
    return data


def refused(response: http.client.HTTPResponse) -> AnswerError:
    """Return the error of an answer that is not the one asked for."""
    body = ""
    with contextlib.suppress(AnswerError, http.client.HTTPException, OSError):
        body = short_body(response, 2**16).decode("utf-8", "replace")
    status = response.status
    code, message = (
        found[1] if (found := re.search(f"<{tag}>([^<]*)</{tag}>", body)) else ""
        for tag in ("Code", "Message")
    )
    text = f"{status} {settings.reason(status)}"
    text = ": ".join(filter(None, [text, code, message]))
    busy = status in (429, 500, 502, 503, 504) or code in ("SlowDown", "RequestTimeout")
    expired = code in ("ExpiredToken", "RequestExpired", "TokenRefreshRequired")
    return AnswerError(text, status=status, code=code, tries=BUSY if busy else 2 if expired else 1)


def parts_of(response: http.client.HTTPResponse, buffer: memoryview, size: int) -> Parts:
    """Yield the next ``size`` bytes of a body; a part is valid until the next iteration."""
    # Read past it, and the rest would wait for the next answer on the connection.
    sent = size if response.length is None else response.length
    if response.length is not None:
        wire: Any = response.fp.raw
        wire.fills = True
    while size:
        room, filled = min(size, sent, len(buffer)), 0
        until = time.monotonic() + _PART_S
        while filled < room:
            if response.length is not None:
                count = response.fp.readinto1(buffer[filled:room])
            else:  # in chunks
                data = response.read1(room - filled)
                count = len(data)
                buffer[filled : filled + count] = data
            filled += count
            if not count or time.monotonic() > until:  # after a read: the thread may start late
                break
        if not filled:
            raise AnswerError("the body ended early", tries=BREAKS)
        size, sent = size - filled, sent - filled
        if not size and response.length is not None:
            response.close()  # so that the connection is kept
        elif not size and response.chunked and response.read1(1):
            raise AnswerError("the answer has more bytes than were asked for")
        yield buffer[:filled]
