"""Partial files: each file being fetched has one in the state folder until it is complete.

A partial file is named after the object's path and version. A journal beside it lists the ranges
that are written, so that a later run resumes where a killed one ended.

Paths are strings here: with thousands of small files, ``pathlib`` takes longer than the requests.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from rayserve_hooks.download.heads import Head
from rayserve_hooks.download.stores import RemoteFile

RANGE_BYTES = 16 * 2**20

Span = tuple[int, int]
"""The first byte of a range, and the first byte after it."""


@dataclass
class PartialFile:
    """One object being fetched.

    Attributes:
        file: The object.
        target: The file it becomes.
        stem: The path of the partial file and of its journal, without their suffixes.
        spans: The ranges it is fetched in.
        done: Those of them that are written.
        head: The store's response to the request for its checksum, if one was made.
        finishing: Whether a thread is about to publish it.
        crcs: By a range's first byte, the CRC64NVME of what this run has written there.
    """

    file: RemoteFile
    target: str
    stem: str
    spans: list[Span]
    done: set[Span]
    head: Future[Head | None] | None = None
    finishing: bool = False
    crcs: dict[int, int] = field(default_factory=dict)
    _fd: int = -1
    _journal_fd: int = -1

    @property
    def path(self) -> str:
        return f"{self.stem}.partial"

    @property
    def _journal(self) -> str:
        return f"{self.stem}.journal"

    @property
    def missing(self) -> list[Span]:
        return [span for span in self.spans if span not in self.done]

    def open(self) -> None:
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._journal_fd = os.open(self._journal, flags, 0o666)

    def write(self, offset: int, data: memoryview) -> None:
        _write_all(self._fd, data, offset)

    def finish_span(self, span: Span) -> None:
        os.write(self._journal_fd, b"%d %d\n" % span)
        self.done.add(span)

    def write_whole(self, data: memoryview) -> None:
        """Write a small file, which needs no journal."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _write_all(fd, data, 0)
        finally:
            os.close(fd)

    def close(self) -> None:
        for fd in (self._fd, self._journal_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._journal_fd = -1

    def remove_journal(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._journal)

    def discard(self) -> None:
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self.remove_journal()
        self.done.clear()
        self.crcs.clear()
        self.finishing = False


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def plan(files: list[RemoteFile], folder: Path, state: Path) -> list[PartialFile]:
    """Find the partial files of earlier runs, and remove those of other versions.

    Args:
        files: What to fetch.
        folder: Where the files go.
        state: Where partial files are kept.

    Returns:
        The partial file of each, the smallest file first.
    """
    # Names hold a hash: paths may be longer, or deeper, than a file name can be.
    names = {file.path: _hash(file.path) for file in files}
    present = set(os.listdir(state)) if state.is_dir() else set()
    partials = []
    current = set()
    for file in sorted(files, key=lambda file: file.size):
        name = f"{names[file.path]}-{_hash(f'{file.version} {file.size}')}"
        current.add(name)
        steps = range(0, file.size, RANGE_BYTES) or [0]
        spans = [(start, min(start + RANGE_BYTES, file.size)) for start in steps]
        partial = PartialFile(file, f"{folder}/{file.path}", f"{state}/{name}", spans, set())
        if f"{name}.partial" in present and f"{name}.journal" in present:
            partial.done = read_journal(state / f"{name}.journal") & set(spans)
        partials.append(partial)
    prefixes = set(names.values())
    for name in present:
        stem, _, kind = name.partition(".")
        stale = stem.partition("-")[0] in prefixes and stem not in current
        # The run was killed after it had published the file.
        orphaned = kind == "journal" and f"{stem}.partial" not in present
        if stale or orphaned:
            (state / name).unlink(missing_ok=True)
    return partials


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_journal(journal: Path) -> set[Span]:
    """Return the ranges that are written."""
    # A line without a newline was cut off by a crash.
    lines = re.findall(r"^(\d+) (\d+)\n", journal.read_text("ascii", "replace"), re.MULTILINE)
    return {(int(start), int(end)) for start, end in lines}
