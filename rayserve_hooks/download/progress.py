"""How far a download is, for the log and for a person who watches."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from rayserve_hooks.core.log import LOGGER_NAME

logger = logging.getLogger(LOGGER_NAME)

REPORT_S = 5.0


class Progress:
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
def watched(progress: Progress) -> Iterator[None]:
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
