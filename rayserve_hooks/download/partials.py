"""Partial files: each file being fetched has one in the state folder until it is complete.

A partial file is named after the object's path and version. A journal beside it lists the segments
that are written, each with its checksum. A later run reads them again before it trusts them: after
a power cut the journal may be on disk without the bytes it speaks of.

Paths are strings here: with thousands of small files, ``pathlib`` takes longer than the requests.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rayserve_hooks.download.checksums import Head
from rayserve_hooks.download.safe_files import open_owned
from rayserve_hooks.download.state import MOST_BYTES, make_way
from rayserve_hooks.download.stores import RemoteFile
from rayserve_hooks.errors import DownloadError

# Each range costs its connection 20 to 30 ms until the first byte comes.
RANGE_BYTES = 2**25
_LEAST_RANGE_BYTES = 2**23
_LINE = re.compile(rb"^(\d{1,19}) (\d{1,19}) ([0-9a-f]{1,16})$", re.MULTILINE)
_STEM = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")
_CHECK_THREADS = 8
_WAY_OUT = "set HF_HOME to move the cache"

Span = tuple[int, int]
"""The first byte of a range, and the first byte after it."""


class Segment(NamedTuple):
    """Bytes of a file that are written, and their checksum by `segment_crc`."""

    start: int
    end: int
    crc: int


@functools.cache
def segment_crc() -> tuple[str, Callable[[memoryview, int], int]]:
    """Return name and function of the checksum of segments: the fastest that is installed."""
    try:
        from awscrt.checksums import crc64nvme
    except ImportError:
        return "crc32", zlib.crc32
    return "crc64nvme", crc64nvme


@functools.cache
def segment_combine() -> Callable[[int, int, int], int] | None:
    """Return what makes the checksum of two segments of theirs and the second one's length."""
    if segment_crc()[0] == "crc32":
        return None
    from awscrt.checksums import combine_crc64nvme

    combine: Callable[[int, int, int], int] = combine_crc64nvme
    return combine


@dataclass
class PartialFile:
    """One object being fetched, and the file it becomes."""

    file: RemoteFile
    target: str
    stem: str  # the path of the partial file and of its journal, without their suffixes
    left_over: bool = False  # by a run before this one
    left: int = 0  # ranges that are still to be fetched
    head: Future[Head | None] | None = None  # of the request for its checksum, if one was made
    _by_end: dict[int, Segment] = field(default_factory=dict)
    _fd: int = -1
    _journal_fd: int = -1

    @property
    def path(self) -> str:
        return f"{self.stem}.partial"

    @property
    def journal(self) -> str:
        """The path of the journal; no journal with another checksum has this name."""
        return f"{self.stem}.{segment_crc()[0]}.journal"

    @property
    def done(self) -> list[Segment]:
        """What is written, in order."""
        return sorted(self._by_end.values())

    @property
    def done_bytes(self) -> int:
        return sum(segment.end - segment.start for segment in self._by_end.values())

    def missing(self, range_bytes: int) -> Iterator[Span]:
        """Yield the ranges to fetch; of an absurd size there are too many for a list."""
        start = 0
        ends = [(segment.start, segment.end) for segment in self.done]
        for end, resume in [*ends, (self.file.size, self.file.size)]:
            while start < end:
                yield start, min(start + range_bytes, end)
                start = min(start + range_bytes, end)
            start = max(start, resume)

    def open(self) -> None:
        if self._fd < 0:
            # What an earlier run has left was looked at, or moved away: nothing else may be there.
            new = 0 if self._by_end else os.O_CREAT | os.O_EXCL
            self._fd = open_owned(self.path, os.O_RDWR | new, 0o644, way_out=_WAY_OUT)
            flags = os.O_WRONLY | os.O_APPEND | new
            self._journal_fd = open_owned(self.journal, flags, 0o644, way_out=_WAY_OUT)

    def write(self, offset: int, data: memoryview) -> None:
        """Write a segment, and a line of the journal after it."""
        end, crc = offset + len(data), segment_crc()[1](data, 0)
        _write_all(self._fd, data, offset)
        os.write(self._journal_fd, b"%d %d %x\n" % (offset, end, crc))
        self._add(Segment(offset, end, crc))

    def _add(self, segment: Segment) -> None:
        """Join a segment with the one before it: of a large file there are too many."""
        before = self._by_end.get(segment.start)
        combine = segment_combine()
        if before is not None and combine is not None:
            crc = combine(before.crc, segment.crc, segment.end - segment.start)
            segment = Segment(before.start, segment.end, crc)
            del self._by_end[before.end]
        self._by_end[segment.end] = segment

    def write_whole(self, data: bytearray | memoryview) -> None:
        """Write a small file, which needs no journal."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        fd = open_owned(self.path, flags, 0o644, way_out=_WAY_OUT)
        try:
            _write_all(fd, memoryview(data), 0)
        finally:
            os.close(fd)

    def close(self) -> None:
        for fd in (self._fd, self._journal_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._journal_fd = -1

    def remove_journal(self) -> None:
        if self._by_end:  # otherwise there is none
            Path(self.journal).unlink(missing_ok=True)

    def discard(self) -> None:
        self.close()
        for path in (self.path, self.journal):
            Path(path).unlink(missing_ok=True)
        self._by_end.clear()

    def resume(self) -> None:
        """Take over what an earlier run has left and can be proved; else start anew."""
        if not self.left_over:
            return
        # A link, a folder, another user's, a damaged one: whatever is wrong, it is not believed.
        with contextlib.suppress(OSError, DownloadError):
            with open(open_owned(self.journal, os.O_RDONLY, way_out=_WAY_OUT), "rb") as journal:
                lines = _LINE.findall(journal.read(MOST_BYTES))
            with open(open_owned(self.path, os.O_RDWR, way_out=_WAY_OUT), "rb+") as file:
                for segment in _proved(lines, file, self.file.size):
                    self._add(segment)
                file.truncate(min(os.fstat(file.fileno()).st_size, self.file.size))
        if not self._by_end:
            make_way(self.path)
            make_way(self.journal)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    # Not by a file object, which asks three more things of the system before it writes.
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _proved(lines: list[tuple[bytes, ...]], file: BinaryIO, size: int) -> list[Segment]:
    """Return the segments that are in the file as the journal says, in order, none twice."""
    crc_of, proved, reached = segment_crc()[1], [], 0
    segments = sorted({Segment(int(start), int(end), int(crc, 16)) for start, end, crc in lines})
    for segment in segments:
        start, end, crc = segment
        if reached <= start < end <= min(size, start + RANGE_BYTES):
            file.seek(start)
            data = file.read(end - start)
            if len(data) == end - start and crc_of(memoryview(data), 0) == crc:
                proved.append(segment)
                reached = end
    return proved


def plan(files: list[RemoteFile], folder: Path, state: Path) -> list[PartialFile]:
    """Return the partial file of each, smallest first; remove what is left of other versions."""
    present = set(os.listdir(state)) if state.is_dir() else set()
    partials = []
    prefixes, stems = set(), set()
    for file in sorted(files, key=lambda file: file.size):
        stem = _stem(file)
        prefixes.add(stem.partition("-")[0])
        stems.add(stem)
        partial = PartialFile(file, f"{folder}/{file.path}", f"{state}/{stem}")
        names = {os.path.basename(path) for path in (partial.path, partial.journal)}
        partial.left_over = not names.isdisjoint(present)
        partials.append(partial)
    for name in present:
        stem, _, kind = name.partition(".")
        stale = stem.partition("-")[0] in prefixes and stem not in stems
        # The run was killed after it had published the file.
        orphaned = kind.endswith("journal") and f"{stem}.partial" not in present
        if stale or orphaned:
            make_way(f"{state}/{name}")
    left_over = [partial for partial in partials if partial.left_over]
    if left_over:
        with ThreadPoolExecutor(_CHECK_THREADS, "resume") as pool:
            list(pool.map(PartialFile.resume, left_over))
    return partials


def range_length(todo: int, streams: int) -> int:
    """Return how long ranges are: as long as useful, but short enough to keep all streams busy."""
    return min(RANGE_BYTES, max(_LEAST_RANGE_BYTES, -(-todo // streams)))


def remove_stale(files: Iterable[RemoteFile], state: Path) -> None:
    """Remove what is left of all but some files, as far as that can be done."""
    stems = {_stem(file) for file in files}
    with contextlib.suppress(OSError):
        for name in os.listdir(state):
            stem = name.partition(".")[0]
            if _STEM.fullmatch(stem) and stem not in stems:
                make_way(f"{state}/{name}")


def _stem(file: RemoteFile) -> str:
    # Hashes: paths may be longer, or deeper, than a file name can be.
    return f"{_hash(file.path)}-{_hash(f'{file.version} {file.size}')}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
