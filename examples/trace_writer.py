"""A callback that writes the trace to a file, for the demo and the tests."""

import dataclasses
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from rayserve_hooks import CallbackCtx, hookimpl


class TraceWriter:
    """Write ``ctx.trace`` as JSON once every other callback has run.

    Args:
        path: The file; it appears by rename, so that a reader never sees half of it.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    @hookimpl(wrapper=True, tryfirst=True)
    def on_after_init(self, ctx: CallbackCtx) -> Generator[None, Any, Any]:
        result = yield
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps([dataclasses.asdict(entry) for entry in ctx.trace]))
        partial.replace(self.path)
        return result
