"""The progress of a download, logged and shown in the caller's progress bar."""

from __future__ import annotations

import threading
import time

from rayserve_hooks.download.caller import Caller

REPORT_S = 5.0


class Progress:
    """Counts bytes; logs the count every few seconds and updates the bar, if there is one.

    Attributes:
        done: The bytes on disk.
        reused: Those of them that earlier runs have fetched.
    """

    def __init__(self, label: str, total: int, reused: int, caller: Caller) -> None:
        self._label, self._total, self._logger = label, total, caller.logger
        self.reused = self.done = reused
        self._lock = threading.Lock()
        self._started = self._logged = time.monotonic()
        self._bar = caller.progress_bar(label, total) if caller.progress_bar else None
        self._shown = 0
        self._show()

    def add(self, size: int) -> None:
        with self._lock:
            self.done += size

    def report(self) -> None:
        self._show()
        now = time.monotonic()
        if now - self._logged < REPORT_S:
            return
        self._logged = now
        rate = (self.done - self.reused) / (now - self._started)
        self._logger.info(
            "%s: %.2f of %.2f GB (%d%%), %.2f GB/s",
            self._label,
            self.done / 1e9,
            self._total / 1e9,
            100 * self.done // max(self._total, 1),
            rate / 1e9,
        )

    def _show(self) -> None:
        if self._bar is not None:
            done = self.done  # other threads go on adding
            self._bar.update(done - self._shown)
            self._shown = done

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
