"""The transfer itself: parallel ranges, verified, resumed, and published by rename.

While an object is on its way its bytes are in a partial file of the state folder, named after the
object's path and version. A journal beside it lists the ranges that are written, so that a later
run goes on where a killed one ended. Every request is pinned to the listed version.

Verified is the size, always, and the store's checksum where there is one: an ETag that is an MD5,
or what S3 says of the full object in answer to a HEAD. Azure, GCS objects composed of parts, and
S3 objects without a full checksum have none: there it is size and version.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayserve_hooks.errors import DownloadError, describe
from rayserve_hooks.stores import Head, RemoteFile, Source, checksum_of, checksum_text, failure
from rayserve_hooks.trace import LOGGER_NAME

if TYPE_CHECKING:
    from obstore import GetOptions

logger = logging.getLogger(LOGGER_NAME)

RANGE_BYTES = 16 * 2**20
# Memory in use is about three chunks for each stream, or all small files that are under way.
CHUNK_BYTES = 3 * 2**19
STREAMS = 24
SMALL_BYTES = 2**18
# Small files are all waiting: 20 to 30 ms each for their first byte.
REQUESTS = 128
# obstore repeats requests, and bodies too where it can; this covers the bodies it cannot.
BODY_ATTEMPTS = 4
BACKOFF_S = 0.2
REPORT_S = 5.0
# MD5 costs more than the download, so for large files S3 is asked for something faster.
_HEAD_ABOVE_BYTES = 64 * 2**20
_THREADS = 4
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
    with _watched(progress), _pools() as (pool, heads):
        try:
            asyncio.run(_Transfer(source, pool, heads, progress, publish).run(downloads))
        except BaseExceptionGroup as group:
            raise _first(group) from group
        finally:
            heads.shutdown(cancel_futures=True)
            # Closed after the writes that are under way: a number is soon another file's.
            pool.shutdown(cancel_futures=True)
            for download in downloads:
                download.close()
    return progress.done - progress.reused


@contextlib.contextmanager
def _pools() -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    with ThreadPoolExecutor(_THREADS, "write") as pool, ThreadPoolExecutor(4, "head") as heads:
        yield pool, heads


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


class _Transfer:
    """The running transfer of some objects, on the event loop of the calling thread."""

    def __init__(
        self,
        source: Source,
        pool: ThreadPoolExecutor,
        heads: ThreadPoolExecutor,
        progress: _Progress,
        publish: Callable[[RemoteFile, Content, Path], None],
    ) -> None:
        self._source, self._pool, self._heads = source, pool, heads
        self._progress = progress
        self._publish = publish
        self._streams = asyncio.Semaphore(STREAMS)
        self._small: asyncio.Queue[tuple[_Download, bytes]] = asyncio.Queue(REQUESTS)

    async def run(self, downloads: list[_Download]) -> None:
        report = asyncio.create_task(self._progress.report())
        try:
            damaged = await self._pass(downloads)
            if damaged:
                for download, error in damaged:
                    logger.warning("fetching once more: %s", error)
                    self._progress.forget(download.file.size)
                    download.discard()
                damaged = await self._pass([download for download, _ in damaged])
            if damaged:
                for download, _ in damaged:
                    download.discard()
                raise damaged[0][1]
        finally:
            report.cancel()

    async def _pass(self, downloads: list[_Download]) -> list[tuple[_Download, DamagedError]]:
        """Fetch what is missing; give the files whose checksum is wrong."""
        damaged: list[tuple[_Download, DamagedError]] = []
        # Started first, so that they are answered while the ranges are under way.
        for download in downloads:
            if _head_wanted(self._source, download.file):
                download.head = self._heads.submit(self._source.head, download.file)
        jobs = self._jobs(downloads)

        async def work() -> None:
            for download, span in jobs:
                try:
                    await self._fetch(download, span)
                except DamagedError as error:
                    damaged.append((download, error))

        async with asyncio.TaskGroup() as group:
            writers = [group.create_task(self._write_small(damaged)) for _ in range(_THREADS)]
            async with asyncio.TaskGroup() as workers:
                for _ in range(REQUESTS):
                    workers.create_task(work())
            await self._small.join()
            for writer in writers:
                writer.cancel()
        return damaged

    async def _write_small(self, damaged: list[tuple[_Download, DamagedError]]) -> None:
        """Write the small files that have arrived: all at once, as changing threads costs more."""
        while True:
            batch = [await self._small.get()]
            while not self._small.empty():
                batch.append(self._small.get_nowait())
            damaged += await self._in_thread(self._finish_small, batch)
            for _ in batch:
                self._small.task_done()

    @staticmethod
    def _jobs(
        downloads: list[_Download],
    ) -> Iterator[tuple[_Download, tuple[int, int] | None]]:
        for download in downloads:
            # None: all there, but the run that fetched it was killed before it was published.
            spans: list[Any] = [*download.missing] or [None]
            yield from ((download, span) for span in spans)

    async def _fetch(self, download: _Download, span: tuple[int, int] | None) -> None:
        if download.file.size <= SMALL_BYTES:
            data = bytearray()
            if download.file.size:
                await self._receive(download.file, 0, download.file.size, _collect(data))
            await self._small.put((download, bytes(data)))
            return
        if span is not None:
            async with self._streams:
                await self._fetch_range(download, *span)
        if len(download.done) == len(download.ranges):
            await self._in_thread(self._finish, download)

    async def _fetch_range(self, download: _Download, start: int, end: int) -> None:
        download.open()
        crc = 0

        async def write(offset: int, chunk: bytes) -> None:
            nonlocal crc
            crc = await self._in_thread(_write, download, offset, chunk, crc)

        await self._receive(download.file, start, end, write)
        download.crcs[start] = crc
        download.finish_range(start, end)

    async def _receive(
        self,
        file: RemoteFile,
        start: int,
        end: int,
        consume: Callable[[int, bytes], Awaitable[None]],
    ) -> None:
        """Fetch a range in order; go on where the body broke off."""
        from obstore import get_async
        from obstore.exceptions import GenericError

        what = f"cannot fetch {file.path!r} of {self._source.uri}"
        problem: Exception | None = None
        for attempt in range(BODY_ATTEMPTS):
            if attempt:
                await asyncio.sleep(random.uniform(0.5, 1) * BACKOFF_S * 2**attempt)
            options: GetOptions = {}
            if file.etag is not None:
                options["if_match"] = file.etag
            if (start, end) != (0, file.size):
                options["range"] = (start, end)
            try:
                result = await get_async(self._source.store, file.path, options=options)
            except Exception as error:  # obstore raises classes of its own per store
                raise failure(what, error) from error
            chunks = result.stream(CHUNK_BYTES)
            while start < end:
                try:
                    chunk = await anext(chunks)
                except StopAsyncIteration:
                    break
                except GenericError as error:
                    problem = error
                    break
                except Exception as error:  # as above
                    raise failure(what, error) from error
                # More than was asked for would be another range's bytes.
                chunk = chunk[: end - start]
                await consume(start, chunk)
                start += len(chunk)
                self._progress.done += len(chunk)
            if start == end:
                return
        if problem is not None:
            raise failure(what, problem) from problem
        raise DownloadError(
            f"{what}: the body ended {end - start} bytes early, {BODY_ATTEMPTS} times; the store "
            "or a proxy cuts it off, or lists another size: check both"
        )

    def _finish_small(
        self, batch: list[tuple[_Download, bytes]]
    ) -> list[tuple[_Download, DamagedError]]:
        damaged = []
        for download, data in batch:
            try:
                content = self._verified(download, functools.partial(checksum_of, data))
                download.partial.write_bytes(data)
                self._publish(download.file, content, download.partial)
            except DamagedError as error:
                damaged.append((download, error))
            except OSError as error:
                raise unwritable(error, download.target) from error
        return damaged

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

    def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Awaitable[Any]:
        return asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


def _collect(data: bytearray) -> Callable[[int, bytes], Awaitable[None]]:
    async def append(offset: int, chunk: bytes) -> None:
        data.extend(chunk)

    return append


def _write(download: _Download, offset: int, chunk: bytes, crc: int) -> int:
    """Write a chunk; give the checksum of the range so far."""
    try:
        view = memoryview(chunk)
        while view:
            written = os.pwrite(download.fd, view, offset)
            view, offset = view[written:], offset + written
    except OSError as error:
        raise unwritable(error, download.partial) from error
    with contextlib.suppress(ImportError):
        from awscrt.checksums import crc64nvme  # type: ignore[import-untyped]

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


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


class _Progress:
    """Counts bytes; tells the log every few seconds, and a bar if a person watches."""

    def __init__(self, label: str, total: int, reused: int) -> None:
        self._label, self._total = label, total
        self.reused = self.done = reused
        self.bar: Any = None
        self._started = time.monotonic()

    def forget(self, size: int) -> None:
        self.done -= size

    async def report(self) -> None:
        logged = self._started
        while True:
            await asyncio.sleep(min(1.0, REPORT_S))
            self.show()
            now = time.monotonic()
            if now - logged >= REPORT_S:
                logged = now
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
