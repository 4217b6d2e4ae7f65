"""Ranges of large S3 objects, read from the socket straight into the buffer that is written.

obstore gives each part of a body as a new object, for which it copies the bytes twice: a quarter of
the time where the machine is the limit and not the network, and more over TLS. So the standard
library's HTTP client is asked first, at an address that obstore has signed. It repeats nothing and
explains nothing: whatever it does not get, obstore is asked for, which does both.

Only for S3: signing Google's and Azure's addresses may cost a request and a permission each.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rayserve_hooks.core.log import LOGGER_NAME
from rayserve_hooks.download.partials import Span
from rayserve_hooks.download.stores import RemoteFile, Source, without_secrets
from rayserve_hooks.errors import describe

if TYPE_CHECKING:
    import http.client

logger = logging.getLogger(LOGGER_NAME)

_TIMEOUT_S = 30
# Each costs a thread a few turns at the interpreter, so larger ones are better, up to a point where
# the system takes longer to find as much memory in one piece for what is written.
_BUFFER_BYTES = 3 * 2**17


class DirectReader:
    """Reads ranges of one store's objects, in any number of threads.

    Args:
        source: The store.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._usable, self._worked = source.scheme == "s3", False
        self._idle: deque[tuple[http.client.HTTPConnection, memoryview]] = deque()

    def read(self, file: RemoteFile, span: Span) -> Iterator[memoryview]:
        """Read a range in order, as far as that goes.

        Args:
            file: The object; the request is pinned to its version.
            span: The range.

        Yields:
            Its parts, each valid until the next is asked for. They end early, even before the
            first, where anything at all is in the way.
        """
        if not self._usable:
            return
        try:
            yield from self._read(file, span)
        except Exception as error:  # of the signature, the connection, the protocol
            # What has worked is tried again for the next range.
            self._usable = self._worked
            uri, why = without_secrets(self._source.uri), describe(error)
            logger.debug("%s: obstore is asked for %s of %s: %s", uri, span, file.path, why)

    def close(self) -> None:
        """Close the connections, once no range is being read any more."""
        for connection, _ in self._idle:
            connection.close()
        self._idle.clear()

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
            answer = connection.getresponse()
            given = answer.headers["Content-Range"]
            if answer.status != 206 or given != f"bytes {start}-{end - 1}/{file.size}":
                raise ConnectionError(f"the answer is {answer.status} {answer.reason}, {given}")
            self._worked = True
            while start < end and (count := answer.readinto(buffer[: end - start])):
                yield buffer[:count]
                start += count
        finally:
            # The connection of a body that has not ended cannot be used again.
            if start == end and answer.isclosed():
                self._idle.append((connection, buffer))
            else:
                connection.close()

    def _connection(self, url: str) -> tuple[http.client.HTTPConnection, memoryview]:
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        import http.client
        import urllib.request

        at = urlsplit(url)
        host = at.hostname or ""
        proxies = urllib.request.getproxies()
        if (at.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(host):
            raise ConnectionError("a proxy is set")
        connection: http.client.HTTPConnection
        if at.scheme == "https":
            connection = http.client.HTTPSConnection(
                host, at.port, timeout=_TIMEOUT_S, context=self._source.tls
            )
        else:
            connection = http.client.HTTPConnection(host, at.port, timeout=_TIMEOUT_S)
        return connection, memoryview(bytearray(_BUFFER_BYTES))
