"""A store's folder of objects that are read whole and written once, such as archives of a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rayserve_hooks.download.caller import STANDALONE, Caller
from rayserve_hooks.download.other_stores import OtherSource
from rayserve_hooks.download.store_errors import failure, native
from rayserve_hooks.download.stores import Source, open_source
from rayserve_hooks.errors import DownloadError

if TYPE_CHECKING:
    from obstore.store import ObjectStore


class ObjectFolder:
    """The objects right below a URI, by their names.

    Args:
        uri: As for `open_source`; of ``file:///path`` the folder must be there.
        caller: The caller of the download.

    Raises:
        DownloadError: The URI is wrong, the folder is not there, or there are no credentials.
    """

    def __init__(self, uri: str, caller: Caller = STANDALONE) -> None:
        if uri.startswith("file://") and not Path(uri.removeprefix("file://")).is_dir():
            raise DownloadError(f"{uri} is no folder; mount it, or make it")
        source = open_source(uri, caller)
        self.shown_uri = source.shown_uri
        self._store, self._prefix = _store_of(source)
        self._closing = source

    def close(self) -> None:
        """Close what is open."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def names(self) -> list[str]:
        """Return the names of the objects, the latest first.

        Raises:
            DownloadError: The store refused.
        """
        import obstore

        with self._failures("list"):
            # The prefix ends with a slash, which obstore drops.
            found = obstore.list_with_delimiter(self._store, self._prefix or None)["objects"]
            found = sorted(found, key=lambda meta: meta["last_modified"], reverse=True)
            return [str(meta["path"]).rpartition("/")[2] for meta in found]

    def read(self, name: str, limit_bytes: int) -> bytes:
        """Return an object.

        Raises:
            DownloadError: The store refused, or the object is larger than the limit.
        """
        import obstore

        with self._failures(f"read {name!r} of"):
            result = obstore.get(self._store, self._prefix + name)
            size = result.meta["size"]
            if size > limit_bytes:
                raise DownloadError(
                    f"{name!r} of {self.shown_uri} has {size:,} bytes, but at most "
                    f"{limit_bytes:,} are read; raise the limit, or delete it"
                )
            return bytes(result.bytes())

    def create(self, name: str, data: bytes) -> bool:
        """Write an object that is complete when it appears; of several writers the first wins.

        Returns:
            Whether it is ours: False if there was one of this name.

        Raises:
            DownloadError: The store refused.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._failures(f"write {name!r} to"):
            try:
                obstore.put(
                    self._store, self._prefix + name, data, mode="create", use_multipart=False
                )
            except (AlreadyExistsError, PreconditionError, FileExistsError):
                return False
            return True

    @contextlib.contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        try:
            with native():
                yield
        except DownloadError:
            raise
        except Exception as error:  # each client raises classes of its own
            raise failure(f"cannot {what} {self.shown_uri}", error) from error


def _store_of(source: Source) -> tuple[ObjectStore, str]:
    """Return obstore's client, and what comes before each name."""
    if isinstance(source, OtherSource):
        return source.store, ""
    from rayserve_hooks.download.s3 import S3Source

    assert isinstance(source, S3Source)
    store = source.store
    if store is None:
        raise DownloadError(
            f"{source.shown_uri} can be read but not written here: its credentials, proxy or "
            "addressing are such that only boto3 takes; use another store for the archives"
        )
    return store, source.prefix
