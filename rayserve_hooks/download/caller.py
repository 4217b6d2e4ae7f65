"""What a download is given by its caller, so that it depends on neither hooks nor Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

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
    """

    logger: logging.Logger = _logger
    label: str = ""
    check_cancelled: Callable[[], None] = lambda: None
    progress_bar: Callable[[str, int], ProgressBar] | None = None


STANDALONE = Caller()
