"""Object stores by URI: what a download asks of each, whatever its kind.

URI forms, credentials, endpoint variables and the ``anonymous@`` convention are Ray's
(``S3FileSystem``, ``PyArrowFileSystem``, Ray 2.60). A URI is no URL: bucket and path are taken as
they are written. Nothing is imported before a store is opened.
"""

from __future__ import annotations

import abc
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from rayserve_hooks.download import settings
from rayserve_hooks.download.caller import STANDALONE, Caller
from rayserve_hooks.download.store_errors import failure, native, shown
from rayserve_hooks.errors import DownloadError, missing_download_extra

STATE_FOLDER = ".rayserve_hooks"
"""Where this package keeps markers and partial files, in the folder it downloads to."""

ANONYMOUS = "anonymous@"
"""Before a bucket's name: send no credentials."""

MOST_OBJECTS = 1_000_000
# The largest object of any store is Azure's, of 190.7 TiB.
_MOST_BYTES = 2**48
_NAME_BYTES = 255
_PATH_BYTES = 3072  # of the 4096 that Linux takes: the cache's folder is above
_WAKE_S = 1.0
# For what is no stall: the imports and the client's making, which take long on a busy machine, and
# the back-off between a client's own tries, whose error says more. botocore's longest is 20 s.
_GRACE_S = 30.0
# Pages in a row whose objects were all in earlier ones; and pages in a row without any, which a
# store may send where much was deleted.
_IDLE_PAGES = 3
_EMPTY_PAGES = 1000
_FORMS = (
    "s3://bucket/path, gs://bucket/path, azure://container@account.blob.core.windows.net/path or "
    "abfss://container@account.dfs.core.windows.net/path"
)
T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """An object of a listing, its path relative to the store's URI."""

    path: str
    size: int  # in bytes
    etag: str | None  # as the store sends it, quotes included
    version: str  # changes whenever the content does: the ETag, or else the time of change


class NothingThereError(DownloadError):
    """A store has no object where one is looked for."""


class Source(abc.ABC):
    """An open store: the folder behind a URI, read for a caller.

    Args:
        uri: As it is written.
        caller: The caller of the download.

    Attributes:
        shown_uri: The URI as it may be logged.
        scheme: What is before ``://``.
        anonymous: Whether no credentials are sent.
        stopped: Set once nothing more is wanted: requests that are under way end.
    """

    def __init__(self, uri: str, caller: Caller = STANDALONE) -> None:
        self.uri, self.caller = uri, caller
        self.shown_uri = shown(uri)
        self.scheme, _, rest = uri.partition("://")
        self.anonymous = rest.startswith(ANONYMOUS)
        self.stopped = threading.Event()
        self._listed: dict[str, RemoteFile] = {}

    @abc.abstractmethod
    def _pages(self) -> Iterator[list[RemoteFile]]:
        """Yield the objects below the URI, in whatever the store sends at once."""

    @abc.abstractmethod
    def _object(self, name: str) -> Iterable[RemoteFile]:
        """Yield the object of exactly this name, if there is one."""

    @abc.abstractmethod
    def parts(self, file: RemoteFile, span: tuple[int, int]) -> Generator[memoryview, None, None]:
        """Yield the bytes of a range in order; a part is valid until the next iteration.

        Every request is pinned to the file's version, and resumed where it breaks off.

        Raises:
            DownloadError: The store refused, the object has changed, or it stalls.
        """

    @abc.abstractmethod
    def head(self, file: RemoteFile) -> Mapping[str, str]:
        """Return the headers of an answer to a HEAD request, with their names in lower case.

        Raises:
            Exception: Whatever the store's client raises.
        """

    def can_head(self) -> bool:
        """Return whether `head` can be asked at all."""
        return True

    def _is_folder(self, file: RemoteFile) -> bool:
        """Return whether an empty object stands for a folder, though its path does not say so."""
        return False

    def stop(self) -> None:
        """End the requests that are under way, within about a second."""
        self.stopped.set()

    def close(self) -> None:
        """Close what is open; call it once nothing is being read."""
        self.stop()

    def list_files(self) -> dict[str, RemoteFile]:
        """Return the objects below the URI by their path.

        Raises:
            DownloadError: The store refused, there is no object, or one cannot be a file.
        """
        what = f"cannot list {self.shown_uri}"
        found: dict[str, RemoteFile] = {}
        idle = empty = 0
        try:
            for page in self._supervised(self._pages, what):
                before = len(found)
                empty = 0 if page else empty + 1
                for file in page:
                    found[file.path] = file
                idle = 0 if len(found) > before or not page else idle + 1
                if idle >= _IDLE_PAGES or empty >= _EMPTY_PAGES:
                    raise DownloadError(
                        f"{what}: it repeats itself after {len(found):,} objects; check the "
                        "endpoint and the proxies: a store ends its listings"
                    )
                if len(found) > MOST_OBJECTS:
                    raise DownloadError(
                        f"{what}: it has more than {MOST_OBJECTS:,} objects; name the folder of "
                        "one model"
                    )
        except Exception as error:  # each client raises classes of its own
            raise failure(what, error) from error
        files = {path: file for path, file in found.items() if self._is_file(file)}
        self._check_parents(files)
        if not files:
            raise NothingThereError(f"{self.shown_uri} holds no object; check bucket and path")
        self._listed = files
        return dict(files)

    def find(self, name: str) -> RemoteFile | None:
        """Return the object of exactly this name below the URI; None if there is none.

        Raises:
            DownloadError: The store refused, or the object cannot be a file.
        """
        what = f"cannot look for {name!r} in {self.shown_uri}"
        try:
            found = list(self._supervised(lambda: self._object(name), what))
        except Exception as error:  # each client raises classes of its own
            raise failure(what, error) from error
        return next(filter(self._is_file, found), None)

    def read(self, path: str, limit_bytes: int) -> bytes:
        """Return a small object of the listing.

        Raises:
            DownloadError: It is larger than the limit, or cannot be read.
        """
        file = self._listed[path]
        if file.size > limit_bytes:
            raise DownloadError(
                f"the object {path!r} of {self.shown_uri} has {file.size:,} bytes, but at most "
                f"{limit_bytes:,} are read of it; correct it, or delete it"
            )
        with contextlib.closing(self.parts(file, (0, file.size))) as parts:
            return b"".join(bytes(part) for part in parts)

    def _is_file(self, file: RemoteFile) -> bool:
        """Return whether an object becomes a file; raise if its path cannot be one's."""
        path = file.path
        if not path or path.split("/", 1)[0] == STATE_FOLDER:
            return False
        if path.endswith("/"):
            if file.size:
                text = "%s: %r is left out: its name is that of a folder, but it has %d bytes"
                self.caller.logger.warning(text, self.shown_uri, path, file.size)
            return False
        what = f"{self.shown_uri} holds an object {path!r}"
        names = path.split("/")
        if path.startswith("/") or ".." in names or "\0" in path:
            raise DownloadError(f"{what}, which would leave the folder it goes to; rename it")
        if "" in names or "." in names:
            raise DownloadError(
                f"{what}, of which a part is empty or '.': no file can have that path; rename it, "
                "or name a folder below it in the URI"
            )
        longest = max(len(name.encode("utf-8", "surrogatepass")) for name in names)
        if longest > _NAME_BYTES or len(path.encode("utf-8", "surrogatepass")) > _PATH_BYTES:
            raise DownloadError(
                f"{what}, which is too long for a file: a name has at most {_NAME_BYTES} bytes, "
                f"a path {_PATH_BYTES:,}; rename it"
            )
        if not 0 <= file.size <= _MOST_BYTES:
            raise DownloadError(
                f"{what} of {file.size:,} bytes, which no store can hold; check the endpoint and "
                "the proxies"
            )
        return True

    def _check_parents(self, files: dict[str, RemoteFile]) -> None:
        """Drop the empty objects that stand for folders; raise where one is file and folder."""
        above: dict[str, str] = {}
        for path in files:
            parent = path.rpartition("/")[0]
            while parent and parent not in above:
                above[parent] = path
                parent = parent.rpartition("/")[0]
        empty = [path for path, file in files.items() if not file.size]
        for path in empty:
            if self._is_folder(files[path]) or (path in above and self._drops_slashes):
                del files[path]
        for path in files.keys() & above.keys():
            raise DownloadError(
                f"{self.shown_uri} holds both {path!r} and {above[path]!r}, and no folder on disk "
                "can: one of them has to be renamed or deleted in the store"
            )

    @property
    def _drops_slashes(self) -> bool:
        """Whether the client lists the marker of a folder without the slash at its end."""
        return False

    def _supervised(self, work: Callable[[], Iterable[T]], what: str) -> Iterator[T]:
        """Yield what another thread makes, so that one that hangs can be cancelled and left.

        Raises:
            DownloadError: Nothing has come for four times the limit on a stall and half a minute.
        """
        yield from supervised(work, self.caller, what, self.stopped)


def supervised(
    work: Callable[[], Iterable[T]], caller: Caller, what: str, stopped: threading.Event
) -> Iterator[T]:
    """Yield what ``work`` yields in a thread of its own; see `Source`."""
    items: queue.SimpleQueue[tuple[list[T], BaseException | None]] = queue.SimpleQueue()
    left = threading.Event()

    def run() -> None:
        try:
            with native():
                for item in work():
                    items.put(([item], None))
                    if left.is_set():
                        return
            items.put(([], None))
        except BaseException as error:  # raised again where it is waited for
            items.put(([], error))

    limit_s = 4 * settings.stall_s() + _GRACE_S
    threading.Thread(target=run, name="rayserve_hooks-store", daemon=True).start()
    last = time.monotonic()
    try:
        while True:
            try:
                found, error = items.get(timeout=_WAKE_S)
            except queue.Empty:
                caller.check_cancelled()
                if time.monotonic() - last > limit_s:
                    stopped.set()
                    raise DownloadError(
                        f"{what}: no answer within {limit_s:.0f} s; look for what stalls, the "
                        f"store, a proxy or the network, or set {settings.STALL_VARIABLE} to wait "
                        "longer"
                    ) from None
                continue
            if error is not None:
                raise error
            if not found:
                return
            caller.check_cancelled()
            last = time.monotonic()
            yield from found
    except BaseException:
        # A thread that hangs in a request is left alone; it ends with its request.
        left.set()
        raise


def open_source(uri: str, caller: Caller = STANDALONE) -> Source:
    """Open the store behind a URI.

    Args:
        uri: ``s3://bucket/path``, ``gs://bucket/path``, both also with ``anonymous@`` before the
            bucket, ``azure://container@account.blob.core.windows.net/path``,
            ``abfss://container@account.dfs.core.windows.net/path`` or ``file:///path``.
        caller: The caller of the download.

    Raises:
        DownloadError: The URI is none of these, a setting is malformed, or there are no
            credentials.
    """
    # The prefix selects Ray's slow client; here there is one client for all.
    uri = uri.removeprefix("pyarrow-")
    what = f"cannot open {shown(uri)}"
    scheme = uri.partition("://")[0]
    if scheme not in ("s3", "gs", "azure", "abfss", "file"):
        raise DownloadError(f"{what}: it is of no store that is supported; write {_FORMS}")
    settings.check(scheme)
    settings.stall_s()

    def make() -> Iterator[Source]:
        if scheme == "s3":
            from rayserve_hooks.download.s3 import S3Source

            yield S3Source(uri, caller)
        else:
            from rayserve_hooks.download.other_stores import OtherSource

            yield OtherSource(uri, caller)

    try:
        # Credentials may be a request, too.
        (source,) = supervised(make, caller, what, threading.Event())
    except ImportError as error:
        raise DownloadError(missing_download_extra(f"downloading {shown(uri)}", error)) from error
    except Exception as error:  # each client raises classes of its own
        named = " and ".join(settings.quoted_in(error))
        also = ", or the same in the configuration file" if named.startswith("AWS_") else ""
        file = ", the credentials and the AWS configuration file"
        check = "the URI" + (file if scheme == "s3" else " and the credentials")
        raise failure(what, error, check=f"{named}{also}" if named else check) from error
    return source
