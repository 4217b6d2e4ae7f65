"""The transfer itself: parallel ranges, verified, resumed, and published by rename.

While an object is fetched its bytes are in a partial file, see `rayserve_hooks.download.partials`.
Every request is pinned to the listed version. The size is always verified, and the store's checksum
if there is one, see `rayserve_hooks.download.checksums`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from rayserve_hooks.download import checksums
from rayserve_hooks.download.caller import Progress
from rayserve_hooks.download.checksums import Heads, expected_checksum
from rayserve_hooks.download.partials import (
    PartialFile,
    Span,
    plan,
    range_length,
    segment_combine,
    segment_crc,
)
from rayserve_hooks.download.state import Content, unwritable
from rayserve_hooks.download.stores import RemoteFile
from rayserve_hooks.errors import DownloadError

# Threads, not an event loop: they need a third less time for the same bytes. A connection to S3
# transfers about 90 MB/s, others less, and machines with more cores have faster networks: at
# 20 MB/s per connection 64 take less than half of the time of 24. Still more would only wait for
# the GIL.
STREAMS = min(64, 16 + 8 * (os.cpu_count() or 1))
SMALL_BYTES = 2**18
# Small files are dominated by latency: 20 to 30 ms each until their first byte.
SMALL_STREAMS = 160
# Threads that write and publish small files: more would only wait for each other, for the GIL and
# for the folder's lock; fewer would be slow if the cache is on a share.
PUBLISHERS = 2
# How often the waiting thread checks for cancellation and reports the progress.
WAKE_S = 1.0
_HEAD_STREAMS = 4


class DamagedError(DownloadError):
    """A downloaded file does not have the size or checksum that the store has."""


T = TypeVar("T")

Publish = Callable[[RemoteFile, Content, str], None]
Consume = Callable[[int, memoryview], None]


def fetch(
    heads: Heads, files: list[RemoteFile], folder: Path, state: Path, publish: Publish
) -> int:
    """Fetch files and publish each when it is complete.

    Args:
        heads: The open store and its checksums.
        files: What to fetch.
        folder: Where the files go.
        state: Where partial files are kept; on the same file system as ``folder``.
        publish: Called with each complete file and the path of its partial file, which it renames.

    Returns:
        The bytes fetched by this run.

    Raises:
        DamagedError: A file failed its verification twice.
        DownloadError: The store refused, or the files cannot be written.
    """
    total = sum(file.size for file in files)
    partials = plan(files, folder, state)
    todo = total - sum(partial.done_bytes for partial in partials)
    try:
        # Before anything that grows with the sizes, which may be absurd.
        _check_target(folder, partials, todo)
        for parent in {str(state), *(os.path.dirname(partial.target) for partial in partials)}:
            os.makedirs(parent, exist_ok=True)
    except OSError as error:
        raise unwritable(error, folder) from error
    progress = Progress(heads.source.shown_uri, total, total - todo, heads.source.caller)
    with contextlib.closing(progress), ThreadPoolExecutor(_HEAD_STREAMS, "head") as head_pool:
        transfer = _Transfer(heads, head_pool, progress, publish)
        try:
            transfer.run(partials)
        finally:
            head_pool.shutdown(cancel_futures=True)
            heads.source.close()
            for partial in partials:
                partial.close()
    return progress.done - progress.reused


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
        self, heads: Heads, head_pool: ThreadPoolExecutor, progress: Progress, publish: Publish
    ) -> None:
        self._source, self._heads, self._head_pool = heads.source, heads, head_pool
        self._caller = heads.source.caller
        self._progress, self._publish = progress, publish
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._arrived: deque[tuple[PartialFile, bytearray]] = deque()
        self._publishers = threading.BoundedSemaphore(PUBLISHERS)
        self._damaged: list[tuple[PartialFile, DamagedError]] = []

    def run(self, partials: list[PartialFile]) -> None:
        damaged = self._pass(partials)
        for partial, error in damaged:
            self._caller.logger.warning("fetching once more: %s", error)
            self._progress.add(-partial.file.size)
            partial.discard()
        damaged = self._pass([partial for partial, _ in damaged])
        for partial, _ in damaged:
            partial.discard()
        if damaged:
            raise damaged[0][1]

    def _pass(self, partials: list[PartialFile]) -> list[tuple[PartialFile, DamagedError]]:
        """Fetch what is missing; return the files that failed their verification."""
        self._damaged = []
        small = deque(partial for partial in partials if partial.file.size <= SMALL_BYTES)
        large = [partial for partial in partials if partial.file.size > SMALL_BYTES]
        todo = sum(partial.file.size - partial.done_bytes for partial in large)
        length = range_length(todo, STREAMS)
        spans: deque[tuple[PartialFile, Span | None]] = deque()
        for partial in large:
            # Submitted first, so that they are done while the ranges are being fetched.
            if self._heads.wanted(partial.file):
                partial.head = self._head_pool.submit(self._heads.of, partial.file)
            # None instead of a range: the run that fetched them all was killed before it published.
            missing = list(partial.missing(length))
            partial.left = len(missing)
            spans.extend((partial, span) for span in missing or (None,))
        with ThreadPoolExecutor(SMALL_STREAMS + STREAMS, "fetch") as pool:
            threads = range(min(SMALL_STREAMS, len(small)))
            workers = [pool.submit(self._each, small, self._fetch_small) for _ in threads]
            threads = range(min(STREAMS, len(spans)))
            workers += [pool.submit(self._each, spans, self._fetch_large) for _ in threads]
            try:
                self._wait(workers)
            except BaseException:
                self._stop.set()  # the pool waits for its threads
                self._source.stop()
                raise
        return self._damaged

    def _wait(self, workers: list[Future[None]]) -> None:
        pending = set(workers)
        while pending:
            done, pending = wait(pending, timeout=WAKE_S, return_when=FIRST_EXCEPTION)
            for worker in done:
                worker.result()
            self._progress.report()
            self._caller.check_cancelled()

    def _each(self, jobs: deque[T], do: Callable[[T], None]) -> None:
        """Process jobs until none is left; all streams of a kind share one queue."""
        for job in _drained(jobs):
            if self._stop.is_set():
                return
            do(job)

    def _fetch_small(self, partial: PartialFile) -> None:
        data = bytearray()
        self._receive(partial.file, (0, partial.file.size), lambda _, part: data.extend(part))
        if self._heads.wanted(partial.file):  # here, because this pool is the larger one
            partial.head = Future()
            partial.head.set_result(self._heads.of(partial.file))
        self._arrived.append((partial, data))
        # Checked again after each turn: another thread may have found all publishers busy.
        while self._arrived:
            if not self._publishers.acquire(blocking=len(self._arrived) > SMALL_STREAMS):
                return
            try:
                for arrived, content in _drained(self._arrived):
                    self._finish(arrived, content)
            finally:
                self._publishers.release()

    def _fetch_large(self, job: tuple[PartialFile, Span | None]) -> None:
        partial, span = job
        if span is not None:
            self._fetch_span(partial, span)
            with self._lock:
                partial.left -= 1
                last = not partial.left
        if span is None or last:
            self._finish(partial)

    def _fetch_span(self, partial: PartialFile, span: Span) -> None:
        try:
            with self._lock:
                partial.open()
            self._receive(partial.file, span, partial.write)
        except OSError as error:
            raise unwritable(error, partial.path) from error

    def _receive(self, file: RemoteFile, span: Span, consume: Consume) -> None:
        """Consume a range in order; resume where a body breaks off."""
        with contextlib.closing(self._source.parts(file, span)) as parts:
            self._take(parts, file, span, consume)

    def _take(
        self, parts: Iterator[memoryview], file: RemoteFile, span: Span, consume: Consume
    ) -> int:
        """Consume parts of a range; return the offset of the first byte after them."""
        start, end = span
        for part in parts:
            if self._stop.is_set():
                raise DownloadError(
                    f"cannot fetch {file.path!r} of {self._source.shown_uri}: another file has "
                    "failed"
                )
            # Excess bytes would belong to another range.
            view = part[: end - start]
            consume(start, view)
            start += len(view)
            self._progress.add(len(view))
        return start

    def _finish(self, partial: PartialFile, data: bytearray | None = None) -> None:
        """Verify and publish a file, which is still in memory if it is a small one."""
        try:
            partial.close()
            size = os.path.getsize(partial.path) if data is None else len(data)
            if size != partial.file.size:
                raise DamagedError(
                    f"{partial.file.path!r} of {self._source.shown_uri} has {size} bytes on disk, "
                    f"but {partial.file.size} in the store"
                )
            content = self._verified(partial, Path(partial.path) if data is None else data)
            if data is not None:
                partial.write_whole(data)
            self._publish(partial.file, content, partial.path)
            partial.remove_journal()
        except DamagedError as error:
            self._damaged.append((partial, error))
        except OSError as error:
            raise unwritable(error, partial.target) from error

    def _verified(self, partial: PartialFile, data: Path | bytearray) -> Content:
        file, digest = partial.file, functools.partial(_digest, partial, data)
        expected = expected_checksum(file, partial.head.result() if partial.head else None)
        got = expected and digest(expected.partition(":")[0])
        if got != expected and partial.head is None:
            # The ETag of an object that is encrypted with a key only looks like an MD5.
            expected = expected_checksum(file, self._heads.of(file))
            got = expected and digest(expected.partition(":")[0])
        if expected is None:
            return Content(digest(segment_crc()[0]), "size")
        if got != expected:
            raise DamagedError(
                f"{file.path!r} of {self._source.shown_uri} has the checksum {expected!r} in the "
                f"store, but {got!r} here; it is damaged in the store or on the way: upload it "
                "again, or look for a proxy that changes it"
            )
        return Content(expected, "checksum")


def _drained(queue: deque[T]) -> Iterator[T]:
    """Yield from a queue that other threads share until it is empty."""
    with contextlib.suppress(IndexError):
        while True:
            yield queue.popleft()


def _digest(partial: PartialFile, data: Path | bytearray, algorithm: str) -> str | None:
    """Return a file's checksum, combined from its segments' where that is possible."""
    combine = segment_combine()
    if combine is not None and algorithm == segment_crc()[0] and isinstance(data, Path):
        crc = reached = 0
        for start, end, part in partial.done:
            if start == reached:
                crc, reached = combine(crc, part, end - start), end
        if reached == partial.file.size:
            return checksums.checksum_text(algorithm, crc.to_bytes(8, "big"))
    return checksums.checksum_of(data, algorithm)
