"""What the cluster gives to a download: Serve's logger, the deployment's name, and Ray's bar."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from rayserve_hooks.cluster import _ray
from rayserve_hooks.context import ContextLogger
from rayserve_hooks.core.log import fields
from rayserve_hooks.core.threads import check_given_up
from rayserve_hooks.download.caller import Caller, ProgressBar
from rayserve_hooks.errors import Phase


def download_caller(
    model_id: str, node_id: str | None = None, fetched: Callable[[int], object] = lambda _: None
) -> Caller:
    """Return the caller of this process's download, as which it logs, waits and is cancelled.

    ``fetched`` is called with how many bytes came, once for each transfer.

    ``RAYSERVE_HOOKS_PROGRESS=1`` in a replica's environment shows a progress bar on the driver's
    terminal; on a driver a terminal has one anyway, unless the variable is ``0``.
    """
    wanted = os.environ.get("RAYSERVE_HOOKS_PROGRESS", "1" if sys.stderr.isatty() else "0")
    started = time.monotonic()

    def here() -> dict[str, Any]:
        seconds = time.monotonic() - started
        return fields(phase=Phase.DOWNLOAD, node=node_id, seconds=seconds)

    return Caller(
        logger=ContextLogger(fields=here),
        label=_ray.deployment_name(model_id),
        check_cancelled=check_given_up,
        progress_bar=_progress_bar if wanted == "1" else None,
        fetched=fetched,
    )


def _progress_bar(description: str, total: int) -> ProgressBar:
    """Create Ray's progress bar, which reaches the driver's terminal from any process."""
    from ray.experimental import tqdm_ray

    return tqdm_ray.tqdm(desc=description, total=total, unit="B")
