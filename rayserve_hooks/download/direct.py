"""Ranges of large S3 objects, read from the socket straight into the buffer that is written.

obstore copies every chunk twice. When the CPU is the bottleneck this costs 25 % of the transfer
time, over TLS more. The standard library's HTTP client does not, but neither retries nor diagnoses;
any range it fails to read is fetched through obstore, which does both.

Only for S3: signing Google's and Azure's URLs may cost a request and a permission each.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rayserve_hooks.download.partials import Span
from rayserve_hooks.download.stores import RemoteFile, Source
from rayserve_hooks.errors import describe

if TYPE_CHECKING:
    import http.client

_TIMEOUT_S = 30
# Each buffer costs a thread a few acquisitions of the GIL, so larger is better, up to the point
# where the kernel takes longer to find contiguous memory for the page cache.
_BUFFER_BYTES = 3 * 2**17


class DirectReader:
    """Reads ranges of one store's objects, in any number of threads."""

    def __init__(self, source: Source) -> None:
        self._source, self._logger = source, source.caller.logger
        self._usable, self._worked = source.scheme == "s3", False
        self._idle: deque[tuple[http.client.HTTPConnection, memoryview]] = deque()

    def read(self, file: RemoteFile, span: Span) -> Generator[memoryview, None, None]:
        """Yield a range's parts in order; after any failure the rest is missing.

        The request is pinned to the file's version. A part is valid until the next iteration.
        """
        if not self._usable:
            return
        try:
            yield from self._read(file, span)
        except Exception as error:  # of the signature, the connection, the protocol
            # Once a range was read, a failure concerns that range alone; the next one is tried.
            self._usable = self._worked
            uri, why = self._source.shown_uri, describe(error)
            self._logger.debug("%s: obstore is asked for %s of %s: %s", uri, span, file.path, why)

    def close(self) -> None:
        """Close the idle connections; call it once no range is being read."""
        for connection, _ in self._idle:
            connection.close()

    def _read(self, file: RemoteFile, span: Span) -> Iterator[memoryview]:
        start, end = span
        url = self._source.readable_url_of(file.path)
        target = urlsplit(url)._replace(scheme="", netloc="").geturl()
        headers = {"Range": f"bytes={start}-{end - 1}"}
        if file.etag is not None:
            headers["If-Match"] = file.etag
        connection, buffer = self._connection(url)
        try:
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
            sent = response.headers["Content-Range"]
            if response.status != 206 or sent != f"bytes {start}-{end - 1}/{file.size}":
                raise ConnectionError(f"the answer is {response.status} {response.reason}, {sent}")
            self._worked = True
            while start < end and (count := response.readinto(buffer[: end - start])):
                yield buffer[:count]
                start += count
        finally:
            # A connection whose body was not read to its end cannot be reused.
            if start == end and response.isclosed():
                self._idle.append((connection, buffer))
            else:
                connection.close()

    def _connection(self, url: str) -> tuple[http.client.HTTPConnection, memoryview]:
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        import http.client
        import urllib.request

        parts = urlsplit(url)
        host = parts.hostname or ""
        proxies = urllib.request.getproxies()
        if (parts.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(host):
            raise ConnectionError("a proxy is set")
        connect: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
        if parts.scheme == "https":
            connect = functools.partial(http.client.HTTPSConnection, context=self._source.tls)
        connection = connect(host, parts.port, timeout=_TIMEOUT_S)
        return connection, memoryview(bytearray(_BUFFER_BYTES))
