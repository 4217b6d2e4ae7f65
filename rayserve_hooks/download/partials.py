"""Partial files: each file being fetched has one in the state folder until it is complete.

A partial file is named after the object's path and version. A journal beside it lists the ranges
that are written, so that a later run resumes where a killed one ended.

Paths are strings here: with thousands of small files, ``pathlib`` takes longer than the requests.
"""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from rayserve_hooks.download.checksums import Head
from rayserve_hooks.download.stores import RemoteFile

RANGE_BYTES = 16 * 2**20

Span = tuple[int, int]
"""The first byte of a range, and the first byte after it."""


@dataclass
class PartialFile:
    """One object being fetched, and the file it becomes."""

    file: RemoteFile
    target: str
    stem: str  # the path of the partial file and of its journal, without their suffixes
    spans: list[Span]  # what it is fetched in
    done: set[Span]  # those of them that are written
    head: Future[Head | None] | None = None  # of the request for its checksum, if one was made
    finishing: bool = False  # a thread is about to publish it
    # By a range's first byte, the CRC64NVME of what this run has written there.
    crcs: dict[int, bytes] = field(default_factory=dict)
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
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written

    def finish_span(self, span: Span) -> None:
        os.write(self._journal_fd, b"%d %d\n" % span)
        self.done.add(span)

    def write_whole(self, data: bytearray | memoryview) -> None:
        """Write a small file, which needs no journal."""
        with open(self.path, "wb") as file:
            file.write(data)

    def close(self) -> None:
        for fd in (self._fd, self._journal_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._journal_fd = -1

    def remove_journal(self) -> None:
        if self.done:  # otherwise there is none
            Path(self._journal).unlink(missing_ok=True)

    def discard(self) -> None:
        self.close()
        for path in (self.path, self._journal):
            Path(path).unlink(missing_ok=True)
        self.done.clear()
        self.crcs.clear()
        self.finishing = False


def plan(files: list[RemoteFile], folder: Path, state: Path) -> list[PartialFile]:
    """Return the partial file of each, smallest first; remove what is left of other versions."""
    present = set(os.listdir(state)) if state.is_dir() else set()
    partials = []
    prefixes, stems = set(), set()
    for file in sorted(files, key=lambda file: file.size):
        # Hashes: paths may be longer, or deeper, than a file name can be.
        prefix = _hash(file.path)
        stem = f"{prefix}-{_hash(f'{file.version} {file.size}')}"
        prefixes.add(prefix)
        stems.add(stem)
        steps = range(0, file.size, RANGE_BYTES) or [0]
        spans = [(start, min(start + RANGE_BYTES, file.size)) for start in steps]
        done: set[Span] = set()
        if f"{stem}.partial" in present and f"{stem}.journal" in present:
            done = read_journal(state / f"{stem}.journal") & set(spans)
        partials.append(PartialFile(file, f"{folder}/{file.path}", f"{state}/{stem}", spans, done))
    for name in present:
        stem, _, kind = name.partition(".")
        stale = stem.partition("-")[0] in prefixes and stem not in stems
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
