"""The transfer itself: parallel ranges, verified, resumed, and published by rename.

While an object is on its way its bytes are in a partial file (`rayserve_hooks.download.partials`). Every
request is pinned to the listed version.

Verified is the size, always, and the store's checksum where there is one: an ETag that is an MD5,
or what a HEAD tells (`rayserve_hooks.download.heads`). Otherwise it is size and version.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rayserve_hooks.core import threads as aio
from rayserve_hooks.core.log import LOGGER_NAME
from rayserve_hooks.download.checksums import checksum_of, checksum_text
from rayserve_hooks.download.direct import DirectReader
from rayserve_hooks.download.heads import Heads, expected_checksum
from rayserve_hooks.download.partials import PartialFile, Span, plan
from rayserve_hooks.download.progress import Progress, watched
from rayserve_hooks.download.stores import RemoteFile, failure
from rayserve_hooks.errors import DownloadError, describe

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult

logger = logging.getLogger(LOGGER_NAME)

# Of obstore's bodies. Small enough that a buffer is used again: larger ones cost more to get from
# the system than to fill. Memory in use is about three chunks for each stream, or all small files
# under way.
CHUNK_BYTES = 2**18
# Threads, not an event loop: with these it takes a third less to move the same bytes. A connection
# to S3 gives about 90 MB/s, others less, and machines with more cores have faster networks: 64 take
# less than half of the time that 24 do where each gives 20 MB/s, but a tenth more on two cores that
# are busy with 24. Still more would only wait for the interpreter.
STREAMS = min(64, 16 + 4 * (os.cpu_count() or 1))
SMALL_BYTES = 2**18
# Small files are all waiting: 20 to 30 ms each for their first byte.
SMALL_STREAMS = 128
# Threads that write and publish small files: more of them would only wait for each other, for the
# interpreter and for the folder's lock; fewer would be slow where the cache is on a share.
PUBLISHERS = 2
# obstore repeats requests, and bodies too where it can; this covers the bodies it cannot.
BODY_ATTEMPTS = 4
BACKOFF_S = 0.2
# How often the waiting thread looks whether it has been given up, and tells how far it is.
WAKE_S = 1.0
_HEAD_STREAMS = 4


class DamagedError(DownloadError):
    """What has been downloaded is not what the store says it holds."""


@dataclass(frozen=True)
class Content:
    """What is known of a file's content.

    Args:
        checksum: ``"<algorithm>:<value>"``; None if no library here computes a fast one.
        verified: ``"checksum"`` if the store has the same one, ``"size"`` if it has none.
    """

    checksum: str | None
    verified: str


T = TypeVar("T")

Publish = Callable[[RemoteFile, Content, str], None]
Consume = Callable[[int, memoryview], None]


def fetch(
    heads: Heads,
    files: list[RemoteFile],
    folder: Path,
    state: Path,
    publish: Publish,
) -> int:
    """Fetch files and publish each when it is whole.

    Args:
        heads: The open store, which is also asked for checksums.
        files: What to fetch.
        folder: Where the files go.
        state: Where partial files are kept; on the same file system as ``folder``.
        publish: Called for each whole file, with the path of its partial file, which it renames.

    Returns:
        The bytes fetched by this run.

    Raises:
        DamagedError: A file was not what the store says it holds, twice.
        DownloadError: The store refused, or the files cannot be written.
    """
    partials = plan(files, folder, state)
    todo = sum(end - start for partial in partials for start, end in partial.missing)
    total = sum(file.size for file in files)
    try:
        for parent in {str(state), *(os.path.dirname(partial.target) for partial in partials)}:
            os.makedirs(parent, exist_ok=True)
        _check_target(folder, partials, todo)
    except OSError as error:
        raise unwritable(error, folder) from error
    progress = Progress(heads.source.uri, total, total - todo)
    with watched(progress), ThreadPoolExecutor(_HEAD_STREAMS, "head") as head_pool:
        transfer = _Transfer(heads, head_pool, progress, publish)
        try:
            transfer.run(partials)
        finally:
            head_pool.shutdown(cancel_futures=True)
            transfer.direct.close()
            for partial in partials:
                partial.close()
    return progress.done - progress.reused


def unwritable(error: OSError, path: str | Path) -> DownloadError:
    """Say that something cannot be written, and why."""
    return DownloadError(
        f"cannot write {error.filename or str(path)!r}: {describe(error)}; check the permissions "
        "and the free space there, or set HF_HOME to move the cache"
    )


def _check_target(folder: Path, partials: list[PartialFile], todo: int) -> None:
    for partial in partials:
        if os.path.isdir(partial.target):
            raise DownloadError(
                f"cannot write {partial.target!r}: a folder of that name is in the way; "
                "move it away"
            )
    needed, free = todo + todo // 100 + 2**20, shutil.disk_usage(folder).free
    if todo and free < needed:
        raise DownloadError(
            f"{str(folder)!r} has {free:,} bytes free, but {needed:,} are needed; free some, or "
            "set HF_HOME to move the cache"
        )


class _Transfer:
    """The running transfer of some objects, in threads."""

    def __init__(
        self,
        heads: Heads,
        head_pool: ThreadPoolExecutor,
        progress: Progress,
        publish: Publish,
    ) -> None:
        self._source, self._heads, self._head_pool = heads.source, heads, head_pool
        self.direct = DirectReader(heads.source)
        self._progress = progress
        self._publish = publish
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._arrived: deque[tuple[PartialFile, bytearray]] = deque()
        self._publishers = threading.BoundedSemaphore(PUBLISHERS)
        self._damaged: list[tuple[PartialFile, DamagedError]] = []

    def run(self, partials: list[PartialFile]) -> None:
        damaged = self._pass(partials)
        if damaged:
            for partial, error in damaged:
                logger.warning("fetching once more: %s", error)
                self._progress.add(-partial.file.size)
                partial.discard()
            damaged = self._pass([partial for partial, _ in damaged])
        if damaged:
            for partial, _ in damaged:
                partial.discard()
            raise damaged[0][1]

    def _pass(self, partials: list[PartialFile]) -> list[tuple[PartialFile, DamagedError]]:
        """Fetch what is missing; give the files whose checksum is wrong."""
        self._damaged = []
        small = deque(partial for partial in partials if partial.file.size <= SMALL_BYTES)
        large = [partial for partial in partials if partial.file.size > SMALL_BYTES]
        # Started first, so that they are answered while the ranges are under way.
        for partial in large:
            if self._heads.wanted(partial.file):
                partial.head = self._head_pool.submit(self._heads.of, partial.file)
        # No range: all is there, but the run that fetched it was killed before it was published.
        spans: deque[tuple[PartialFile, Span | None]] = deque()
        for partial in large:
            spans.extend((partial, span) for span in partial.missing or (None,))
        with ThreadPoolExecutor(SMALL_STREAMS + STREAMS, "fetch") as pool:
            workers = [
                *(
                    pool.submit(self._each, small, self._fetch_small)
                    for _ in range(min(SMALL_STREAMS, len(small)))
                ),
                *(
                    pool.submit(self._each, spans, self._fetch_large)
                    for _ in range(min(STREAMS, len(spans)))
                ),
            ]
            try:
                self._wait(workers)
            except BaseException:
                self._stop.set()  # the pool waits for its threads
                raise
        return self._damaged

    def _wait(self, workers: list[Future[None]]) -> None:
        pending = set(workers)
        while pending:
            done, pending = wait(pending, timeout=WAKE_S, return_when=FIRST_EXCEPTION)
            for worker in done:
                worker.result()
            self._progress.report()
            aio.check_given_up()

    def _each(self, jobs: deque[T], do: Callable[[T], None]) -> None:
        """Take jobs until none is left; all streams of a kind take from the same."""
        while not self._stop.is_set():
            try:
                job = jobs.popleft()
            except IndexError:
                return
            do(job)

    def _fetch_small(self, partial: PartialFile) -> None:
        data = bytearray()
        if partial.file.size:
            self._receive(partial.file, (0, partial.file.size), lambda _, chunk: data.extend(chunk))
        if self._heads.wanted(partial.file):  # here, where many wait at once
            partial.head = Future()
            partial.head.set_result(self._heads.of(partial.file))
        self._arrived.append((partial, data))
        # Looked at again after each turn: another thread may have come while none was to be had.
        while self._arrived:
            if not self._publishers.acquire(blocking=len(self._arrived) > SMALL_STREAMS):
                return
            try:
                self._publish_arrived()
            finally:
                self._publishers.release()

    def _publish_arrived(self) -> None:
        while True:
            try:
                partial, data = self._arrived.popleft()
            except IndexError:
                return
            try:
                content = self._verified(partial, functools.partial(checksum_of, data))
                partial.write_whole(memoryview(data))
                self._publish(partial.file, content, partial.path)
            except DamagedError as error:
                self._damaged.append((partial, error))
            except OSError as error:
                raise unwritable(error, partial.target) from error

    def _fetch_large(self, job: tuple[PartialFile, Span | None]) -> None:
        partial, span = job
        if span is not None:
            self._fetch_span(partial, span)
        with self._lock:
            last = len(partial.done) == len(partial.spans) and not partial.finishing
            partial.finishing |= last
        if last:
            try:
                self._finish(partial)
            except DamagedError as error:
                self._damaged.append((partial, error))
            except OSError as error:
                raise unwritable(error, partial.target) from error

    def _fetch_span(self, partial: PartialFile, span: Span) -> None:
        crc, go_on = 0, _crc64nvme()

        def write(offset: int, chunk: memoryview) -> None:
            nonlocal crc
            partial.write(offset, chunk)
            crc = go_on(chunk, crc)

        try:
            with self._lock:
                partial.open()
            start = self._take(self.direct.read(partial.file, span), partial.file, span, write)
            self._receive(partial.file, (start, span[1]), write)
            partial.crcs[span[0]] = crc
            partial.finish_span(span)
        except OSError as error:
            raise unwritable(error, partial.path) from error

    def _receive(self, file: RemoteFile, span: Span, consume: Consume) -> None:
        """Fetch a range in order; go on where the body broke off."""
        import obstore
        from obstore.exceptions import GenericError

        start, end = span
        what = f"cannot fetch {file.path!r} of {self._source.uri}"
        problem: Exception | None = None

        def chunks_of(result: GetResult) -> Iterator[memoryview]:
            nonlocal problem
            try:
                for chunk in result.stream(CHUNK_BYTES):
                    yield memoryview(chunk)
            except GenericError as error:
                problem = error
            except Exception as error:  # obstore raises classes of its own per store
                raise failure(what, error) from error

        attempts = 0
        while start < end:
            if attempts == BODY_ATTEMPTS:
                if problem is not None:
                    raise failure(what, problem) from problem
                raise DownloadError(
                    f"{what}: the body ended {end - start} bytes early, {BODY_ATTEMPTS} times; the "
                    "store or a proxy cuts it off, or lists another size: check both"
                )
            if attempts:
                self._stop.wait(random.uniform(0.5, 1) * BACKOFF_S * 2**attempts)
            attempts += 1
            options: GetOptions = {}
            if file.etag is not None:
                options["if_match"] = file.etag
            if (start, end) != (0, file.size):
                options["range"] = (start, end)
            try:
                result = obstore.get(self._source.store, file.path, options=options)
            except Exception as error:  # as above
                raise failure(what, error) from error
            start = self._take(chunks_of(result), file, (start, end), consume)

    def _take(
        self, chunks: Iterator[memoryview], file: RemoteFile, span: Span, consume: Consume
    ) -> int:
        """Consume the parts of a range; give the first byte behind them."""
        start, end = span
        for chunk in chunks:
            if self._stop.is_set():
                raise DownloadError(
                    f"cannot fetch {file.path!r} of {self._source.uri}: another file has failed"
                )
            # More than was asked for would be another range's bytes.
            view = chunk[: end - start]
            consume(start, view)
            start += len(view)
            self._progress.add(len(view))
        return start

    def _finish(self, partial: PartialFile) -> None:
        partial.close()
        size = os.path.getsize(partial.path)
        if size != partial.file.size:
            raise DamagedError(
                f"{partial.file.path!r} of {self._source.uri} has {size} bytes on disk, but "
                f"{partial.file.size} in the store"
            )
        content = self._verified(partial, functools.partial(_digest, partial))
        self._publish(partial.file, content, partial.path)
        partial.forget_journal()

    def _verified(self, partial: PartialFile, compute: Callable[[str], str | None]) -> Content:
        file = partial.file
        head = partial.head.result() if partial.head else None
        expected = expected_checksum(file, head)
        got = None if expected is None else compute(expected.partition(":")[0])
        if got != expected and partial.head is None:
            # The ETag of an object that is encrypted with a key only looks like an MD5.
            expected = expected_checksum(file, self._heads.of(file))
            got = None if expected is None else compute(expected.partition(":")[0])
        if expected is None:
            return Content(compute("crc64nvme"), "size")
        if got != expected:
            raise DamagedError(
                f"{file.path!r} of {self._source.uri} has the checksum {expected!r} in the store, "
                f"but {got!r} here; it is damaged in the store or on the way: upload it again, or "
                "look for a proxy that changes it"
            )
        return Content(expected, "checksum")


def _crc64nvme() -> Callable[[memoryview, int], int]:
    """Give the function that goes on with a checksum; 0 where its library is missing."""
    try:
        from awscrt.checksums import crc64nvme
    except ImportError:
        return lambda data, crc: 0
    return crc64nvme  # type: ignore[no-any-return]


def _digest(partial: PartialFile, algorithm: str) -> str | None:
    """Compute a file's checksum, from those of its ranges where this run has seen all of them."""
    if algorithm == "crc64nvme" and len(partial.crcs) == len(partial.spans):
        with contextlib.suppress(ImportError):
            from awscrt.checksums import combine_crc64nvme

            crc = 0
            for start, end in partial.spans:
                crc = combine_crc64nvme(crc, partial.crcs[start], end - start)
            return checksum_text(algorithm, crc.to_bytes(8, "big"))
    return checksum_of(Path(partial.path), algorithm)
