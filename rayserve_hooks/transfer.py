"""The transfer itself: parallel ranges, verified, resumed, and published by rename.

While an object is on its way its bytes are in a partial file of the state folder, named after the
object's path and version. A journal beside it lists the ranges that are written, so that a later
run goes on where a killed one ended. Every request is pinned to the listed version.

Verified is the size, always, and the store's checksum where there is one: an ETag that is an MD5,
or what S3 says of the full object in answer to a HEAD. Azure, GCS objects composed of parts, and
S3 objects without a full checksum have none: there it is size and version.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import random
import re
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayserve_hooks import aio
from rayserve_hooks.errors import DownloadError, describe
from rayserve_hooks.stores import Head, RemoteFile, Source, checksum_of, checksum_text, failure
from rayserve_hooks.trace import LOGGER_NAME

if TYPE_CHECKING:
    from obstore import GetOptions

logger = logging.getLogger(LOGGER_NAME)

RANGE_BYTES = 16 * 2**20
# Small enough that a buffer is used again: larger ones cost more to get from the system than to
# fill. Memory in use is about three chunks for each stream, or all small files under way.
CHUNK_BYTES = 2**18
# Threads, not an event loop: with these it takes a third less to move the same bytes.
STREAMS = 24
SMALL_BYTES = 2**18
# Small files are all waiting: 20 to 30 ms each for their first byte.
SMALL_STREAMS = 96
# obstore repeats requests, and bodies too where it can; this covers the bodies it cannot.
BODY_ATTEMPTS = 4
BACKOFF_S = 0.2
REPORT_S = 5.0
# MD5 costs more than the download, so for large files S3 is asked for something faster.
_HEAD_ABOVE_BYTES = 64 * 2**20
_MD5_ETAG = re.compile(r'"?([0-9a-f]{32})"?')


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


@dataclass
class _Download:
    """One object on its way."""

    file: RemoteFile
    target: Path
    partial: Path
    ranges: list[tuple[int, int]]
    done: set[tuple[int, int]]
    head: Future[Head | None] | None = None
    finishing: bool = False
    crcs: dict[int, int] = field(default_factory=dict)
    fd: int = -1
    journal_fd: int = -1

    @property
    def journal(self) -> Path:
        return self.partial.with_suffix(".journal")

    @property
    def missing(self) -> list[tuple[int, int]]:
        return [span for span in self.ranges if span not in self.done]

    def open(self) -> None:
        if self.fd < 0:
            self.fd = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self.journal_fd = os.open(self.journal, flags, 0o666)

    def finish_range(self, start: int, end: int) -> None:
        os.write(self.journal_fd, b"%d %d\n" % (start, end))
        self.done.add((start, end))

    def close(self) -> None:
        for fd in (self.fd, self.journal_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.journal_fd = -1

    def discard(self) -> None:
        self.close()
        self.partial.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)
        self.done.clear()
        self.crcs.clear()
        self.finishing = False


def fetch(
    source: Source,
    files: list[RemoteFile],
    folder: Path,
    state: Path,
    publish: Callable[[RemoteFile, Content, Path], None],
) -> int:
    """Fetch files and publish each when it is whole.

    Args:
        source: The open store.
        files: What to fetch.
        folder: Where the files go.
        state: Where partial files are kept; on the same file system as ``folder``.
        publish: Called for each whole file, with its partial file, which it renames.

    Returns:
        The bytes fetched by this run.

    Raises:
        DamagedError: A file was not what the store says it holds, twice.
        DownloadError: The store refused, or the files cannot be written.
    """
    downloads = _plan(files, folder, state)
    todo = sum(end - start for download in downloads for start, end in download.missing)
    total = sum(file.size for file in files)
    try:
        for parent in {state, *(download.target.parent for download in downloads)}:
            parent.mkdir(parents=True, exist_ok=True)
        _check_target(folder, downloads, todo)
    except OSError as error:
        raise unwritable(error, folder) from error
    progress = _Progress(source.uri, total, total - todo)
    with _watched(progress), ThreadPoolExecutor(4, "head") as heads:
        transfer = _Transfer(source, heads, progress, publish)
        try:
            transfer.run(downloads)
        finally:
            heads.shutdown(cancel_futures=True)
            for download in downloads:
                download.close()
    return progress.done - progress.reused


def unwritable(error: OSError, path: Path) -> DownloadError:
    """Say that something cannot be written, and why."""
    return DownloadError(
        f"cannot write {error.filename or str(path)!r}: {describe(error)}; check the permissions "
        "and the free space there, or set HF_HOME to move the cache"
    )


def store_checksum(source: Source, file: RemoteFile) -> str | None:
    """Give the checksum that the store has of an object, if any."""
    return _expected(file, source.head(file) if _head_wanted(source, file) else None)


def _expected(file: RemoteFile, head: Head | None) -> str | None:
    if head is not None and head.checksum is not None:
        return head.checksum
    found = _MD5_ETAG.fullmatch(file.etag or "")
    if found is None or (head is not None and not head.etag_is_md5):
        return None
    return f"md5:{found[1]}"


def _head_wanted(source: Source, file: RemoteFile) -> bool:
    is_md5 = _MD5_ETAG.fullmatch(file.etag or "") is not None
    return source.is_s3 and (file.size > _HEAD_ABOVE_BYTES or not is_md5)


def _plan(files: list[RemoteFile], folder: Path, state: Path) -> list[_Download]:
    """See what earlier runs have left, and remove what they left of other versions."""
    # Names hold a hash: paths may be longer, or deeper, than a file name can be.
    names = {file.path: _hash(file.path) for file in files}
    present = {entry.name for entry in state.iterdir()} if state.is_dir() else set()
    downloads = []
    for file in sorted(files, key=lambda file: file.size):
        partial = state / f"{names[file.path]}-{_hash(f'{file.version} {file.size}')}.partial"
        steps = range(0, file.size, RANGE_BYTES) or [0]
        ranges = [(start, min(start + RANGE_BYTES, file.size)) for start in steps]
        download = _Download(file, folder / file.path, partial, ranges, set())
        if partial.name in present and download.journal.name in present:
            download.done = _journaled(download.journal) & set(ranges)
        downloads.append(download)
    current = {download.partial.stem for download in downloads}
    prefixes = set(names.values())
    for name in present:
        stem, _, kind = name.partition(".")
        stale = stem.partition("-")[0] in prefixes and stem not in current
        # Its run was killed after it had published the file.
        alone = kind == "journal" and f"{stem}.partial" not in present
        if stale or alone:
            (state / name).unlink(missing_ok=True)
    return downloads


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _journaled(journal: Path) -> set[tuple[int, int]]:
    # A line without its end was cut off by a crash.
    lines = re.findall(r"^(\d+) (\d+)\n", journal.read_text("ascii", "replace"), re.MULTILINE)
    return {(int(start), int(end)) for start, end in lines}


def _check_target(folder: Path, downloads: list[_Download], todo: int) -> None:
    for download in downloads:
        if download.target.is_dir():
            raise DownloadError(
                f"cannot write {str(download.target)!r}: a folder of that name is in the way; "
                "move it away"
            )
    needed, free = todo + todo // 100 + 2**20, shutil.disk_usage(folder).free
    if todo and free < needed:
        raise DownloadError(
            f"{str(folder)!r} has {free:,} bytes free, but {needed:,} are needed; free some, or "
            "set HF_HOME to move the cache"
        )


Job = tuple[_Download, tuple[int, int] | None]
"""A range to fetch; None for a small file, or where only the publishing is left to do."""


class _Transfer:
    """The running transfer of some objects, in threads."""

    def __init__(
        self,
        source: Source,
        heads: ThreadPoolExecutor,
        progress: _Progress,
        publish: Callable[[RemoteFile, Content, Path], None],
    ) -> None:
        self._source, self._heads = source, heads
        self._progress = progress
        self._publish = publish
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self, downloads: list[_Download]) -> None:
        damaged = self._pass(downloads)
        if damaged:
            for download, error in damaged:
                logger.warning("fetching once more: %s", error)
                self._progress.add(-download.file.size)
                download.discard()
            damaged = self._pass([download for download, _ in damaged])
        if damaged:
            for download, _ in damaged:
                download.discard()
            raise damaged[0][1]

    def _pass(self, downloads: list[_Download]) -> list[tuple[_Download, DamagedError]]:
        """Fetch what is missing; give the files whose checksum is wrong."""
        # Started first, so that they are answered while the ranges are under way.
        for download in downloads:
            if _head_wanted(self._source, download.file):
                download.head = self._heads.submit(self._source.head, download.file)
        small: deque[Job] = deque((d, None) for d in downloads if d.file.size <= SMALL_BYTES)
        large = [d for d in downloads if d.file.size > SMALL_BYTES]
        # No range: all is there, but the run that fetched it was killed before it was published.
        spans: deque[Job] = deque((d, span) for d in large for span in d.missing or [None])  # type: ignore[list-item]
        damaged: list[tuple[_Download, DamagedError]] = []
        with ThreadPoolExecutor(SMALL_STREAMS + STREAMS, "fetch") as pool:
            workers = [
                pool.submit(self._work, jobs, damaged)
                for jobs, streams in ((small, SMALL_STREAMS), (spans, STREAMS))
                for _ in range(min(streams, len(jobs)))
            ]
            try:
                self._wait(workers)
            except BaseException:
                self._stop.set()  # the pool waits for its threads
                raise
        return damaged

    def _wait(self, workers: list[Future[None]]) -> None:
        pending = set(workers)
        while pending:
            done, pending = wait(pending, timeout=REPORT_S / 5, return_when=FIRST_EXCEPTION)
            for worker in done:
                worker.result()
            self._progress.report()
            aio.check_given_up()

    def _work(self, jobs: deque[Job], damaged: list[tuple[_Download, DamagedError]]) -> None:
        """Take jobs until none is left; all streams take from the same."""
        while not self._stop.is_set():
            try:
                download, span = jobs.popleft()
            except IndexError:
                return
            try:
                self._fetch(download, span)
            except DamagedError as error:
                damaged.append((download, error))

    def _fetch(self, download: _Download, span: tuple[int, int] | None) -> None:
        if download.file.size <= SMALL_BYTES:
            data = bytearray()
            if download.file.size:
                self._receive(
                    download.file, 0, download.file.size, lambda _, chunk: data.extend(chunk)
                )
            self._finish_small(download, data)
            return
        if span is not None:
            self._fetch_range(download, *span)
        with self._lock:
            last = len(download.done) == len(download.ranges) and not download.finishing
            download.finishing |= last
        if last:
            self._finish(download)

    def _fetch_range(self, download: _Download, start: int, end: int) -> None:
        crc = 0

        def write(offset: int, chunk: Any) -> None:
            nonlocal crc
            crc = _write(download, offset, chunk, crc)

        with self._lock:
            download.open()
        self._receive(download.file, start, end, write)
        download.crcs[start] = crc
        download.finish_range(start, end)

    def _receive(
        self, file: RemoteFile, start: int, end: int, consume: Callable[[int, Any], None]
    ) -> None:
        """Fetch a range in order; go on where the body broke off."""
        import obstore
        from obstore.exceptions import GenericError

        what = f"cannot fetch {file.path!r} of {self._source.uri}"
        problem: Exception | None = None
        for attempt in range(BODY_ATTEMPTS):
            if attempt:
                self._stop.wait(random.uniform(0.5, 1) * BACKOFF_S * 2**attempt)
            options: GetOptions = {}
            if file.etag is not None:
                options["if_match"] = file.etag
            if (start, end) != (0, file.size):
                options["range"] = (start, end)
            try:
                result = obstore.get(self._source.store, file.path, options=options)
            except Exception as error:  # obstore raises classes of its own per store
                raise failure(what, error) from error
            chunks = iter(result.stream(CHUNK_BYTES))
            while start < end:
                if self._stop.is_set():
                    raise DownloadError(f"{what}: another file has failed")
                try:
                    chunk = next(chunks)
                except StopIteration:
                    break
                except GenericError as error:
                    problem = error
                    break
                except Exception as error:  # as above
                    raise failure(what, error) from error
                # More than was asked for would be another range's bytes.
                view = memoryview(chunk)[: end - start]
                consume(start, view)
                start += len(view)
                self._progress.add(len(view))
            if start == end:
                return
        if problem is not None:
            raise failure(what, problem) from problem
        raise DownloadError(
            f"{what}: the body ended {end - start} bytes early, {BODY_ATTEMPTS} times; the store "
            "or a proxy cuts it off, or lists another size: check both"
        )

    def _finish_small(self, download: _Download, data: bytearray) -> None:
        try:
            content = self._verified(download, functools.partial(checksum_of, bytes(data)))
            download.partial.write_bytes(data)
            self._publish(download.file, content, download.partial)
        except OSError as error:
            raise unwritable(error, download.target) from error

    def _finish(self, download: _Download) -> None:
        try:
            download.close()
            size = download.partial.stat().st_size
            if size != download.file.size:
                raise DamagedError(
                    f"{download.file.path!r} of {self._source.uri} has {size} bytes on disk, but "
                    f"{download.file.size} in the store"
                )
            content = self._verified(download, functools.partial(_digest, download))
            self._publish(download.file, content, download.partial)
            download.journal.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(error, download.target) from error

    def _verified(self, download: _Download, compute: Callable[[str], str | None]) -> Content:
        file, head = download.file, download.head.result() if download.head else None
        expected = _expected(file, head)
        if expected is None:
            return Content(compute("crc64nvme"), "size")
        got = compute(expected.partition(":")[0])
        if got != expected and head is None and expected.startswith("md5:"):
            # The ETag of an object that is encrypted with a key only looks like an MD5.
            head = self._source.head(file)
            expected = _expected(file, head)
            got = None if expected is None else compute(expected.partition(":")[0])
        if got != expected:
            raise DamagedError(
                f"{file.path!r} of {self._source.uri} has the checksum {expected!r} in the store, "
                f"but {got!r} here; it is damaged in the store or on the way: upload it again, or "
                "look for a proxy that changes it"
            )
        if expected is None:
            return Content(compute("crc64nvme"), "size")
        return Content(expected, "checksum")


def _write(download: _Download, offset: int, chunk: memoryview, crc: int) -> int:
    """Write a chunk; give the checksum of the range so far."""
    try:
        view = chunk
        while view:
            written = os.pwrite(download.fd, view, offset)
            view, offset = view[written:], offset + written
    except OSError as error:
        raise unwritable(error, download.partial) from error
    with contextlib.suppress(ImportError):
        from awscrt.checksums import crc64nvme

        crc = crc64nvme(chunk, crc)
    return crc


def _digest(download: _Download, algorithm: str) -> str | None:
    """Compute a file's checksum, from those of its ranges where this run has seen all of them."""
    if algorithm == "crc64nvme" and len(download.crcs) == len(download.ranges):
        with contextlib.suppress(ImportError):
            from awscrt.checksums import combine_crc64nvme

            crc = 0
            for start, end in download.ranges:
                crc = combine_crc64nvme(crc, download.crcs[start], end - start)
            return checksum_text(algorithm, crc.to_bytes(8, "big"))
    return checksum_of(download.partial, algorithm)


class _Progress:
    """Counts bytes; tells the log every few seconds, and a bar if a person watches."""

    def __init__(self, label: str, total: int, reused: int) -> None:
        self._label, self._total = label, total
        self.reused = self.done = reused
        self.bar: Any = None
        self._lock = threading.Lock()
        self._started = self._logged = time.monotonic()

    def add(self, size: int) -> None:
        with self._lock:
            self.done += size

    def report(self) -> None:
        self.show()
        now = time.monotonic()
        if now - self._logged < REPORT_S:
            return
        self._logged = now
        rate = (self.done - self.reused) / (now - self._started)
        logger.info(
            "%s: %.2f of %.2f GB (%d%%), %.2f GB/s",
            self._label,
            self.done / 1e9,
            self._total / 1e9,
            100 * self.done // max(self._total, 1),
            rate / 1e9,
        )

    def show(self) -> None:
        if self.bar is not None:
            self.bar.update(self.done - self.bar.n)


@contextlib.contextmanager
def _watched(progress: _Progress) -> Iterator[None]:
    """Show Ray's progress bar, which reaches the driver's terminal from any process."""
    wanted = os.environ.get("RAYSERVE_HOOKS_PROGRESS", "1" if sys.stderr.isatty() else "0")
    if wanted != "1":
        yield
        return
    from ray.experimental import tqdm_ray

    progress.bar = tqdm_ray.tqdm(desc=progress._label, total=progress._total, unit="B")
    try:
        progress.show()
        yield
        progress.show()
    finally:
        progress.bar.close()
