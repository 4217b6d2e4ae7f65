"""What a download gets from its caller, so that it depends on neither hooks nor Ray."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

REPORT_S = 5.0
_logger = logging.getLogger("rayserve_hooks.download")


class ProgressBar(Protocol):
    """The part of tqdm's interface that is used."""

    def update(self, n: int, /) -> object: ...
    def close(self) -> object: ...


@dataclass(frozen=True)
class Caller:
    """The caller of a download; by default one that neither cancels nor shows a bar.

    Args:
        logger: Logs progress, retries and missing checksums.
        label: Whom the model is for, shown to processes that wait for the lock; by default the
            model id.
        check_cancelled: Called about once per second during the transfer; raises to end it.
        progress_bar: Called with a description and the total in bytes; None for no bar.
        fetched: Called with how many bytes came, once for each transfer.
    """

    logger: logging.Logger | logging.LoggerAdapter[logging.Logger] = _logger
    label: str = ""
    check_cancelled: Callable[[], None] = lambda: None
    progress_bar: Callable[[str, int], ProgressBar] | None = None
    fetched: Callable[[int], object] = lambda _: None


STANDALONE = Caller()


class Progress:
    """Counts the bytes on disk; logs them every few seconds and updates the bar, if any."""

    def __init__(self, label: str, total: int, reused: int, caller: Caller) -> None:
        self._label, self._total, self._logger = label, total, caller.logger
        self.reused = self.done = reused
        self._lock = threading.Lock()
        self._started = self._logged = time.monotonic()
        self._bar = caller.progress_bar(label, total) if caller.progress_bar else None
        self._shown = 0
        self._fetched = caller.fetched
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
        done, total = self.done, self._total
        percent = 100 * done // max(total, 1)
        rate = (done - self.reused) / (now - self._started)
        text = "%s: %.2f of %.2f GB (%d%%), %.2f GB/s"
        self._logger.info(text, self._label, done / 1e9, total / 1e9, percent, rate / 1e9)

    def _show(self) -> None:
        if self._bar is not None:
            done = self.done  # other threads go on adding
            self._bar.update(done - self._shown)
            self._shown = done

    def close(self) -> None:
        self._fetched(self.done - self.reused)
        if self._bar is not None:
            self._bar.close()
