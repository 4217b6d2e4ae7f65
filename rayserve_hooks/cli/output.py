"""What the commands print: JSON whose shape is documented, and tables for people."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import TypedDict  # pydantic's, which makes a schema of it on any Python

from rayserve_hooks.trace import format_table


class OrderRow(TypedDict):
    """One call, in run order, of ``order --json``."""

    deployment: str
    hook: str
    result: str
    position: int
    callback: str
    options: list[str]
    distribution: str
    source: str
    where: str


class PluginRow(TypedDict):
    """One callback with a short name, of ``plugins --json``."""

    name: str
    callback: str
    hooks: list[str]
    distribution: str
    source: str
    note: str


class CheckedDeployment(TypedDict):
    """One deployment of ``check --json``."""

    deployment: str
    callbacks: list[str]


class CheckReport(TypedDict):
    """What ``check --json`` prints."""

    ok: bool
    deployments: list[CheckedDeployment]
    problems: list[str]
    unseen: list[str]


class DoctorRow(TypedDict):
    """One finding of ``doctor --json``."""

    node: str
    deployment: str
    subject: str
    state: str
    detail: str
    advice: str


class PrefetchRow(TypedDict):
    """One node and deployment of ``prefetch --json``."""

    deployment: str
    node: str
    address: str
    ok: bool
    model_path: str | None
    callback: str
    hook_s: float
    download_s: float
    error: str


SHAPES: Mapping[str, Any] = {
    "order": list[OrderRow],
    "plugins": list[PluginRow],
    "check": CheckReport,
    "doctor": list[DoctorRow],
    "prefetch": list[PrefetchRow],
}
"""By command, what it prints with ``--json``; keys may be added, and none is taken away."""

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red", "ready": "green", "failed": "red"}


def as_json(value: object) -> str:
    """Return JSON as all commands print it."""
    return json.dumps(value, indent=2)


def table(rows: Sequence[Mapping[str, object]], nothing: str) -> str:
    """Return rows as a table: in colours where ``rich`` is installed and a terminal reads it."""
    if not rows:
        return nothing
    header = list(rows[0])
    cells = [[_cell(value) for value in row.values()] for row in rows]
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            return _coloured(header, cells)
    return format_table(header, cells)


def _coloured(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        made.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in row))
    console = Console()
    with console.capture() as capture:
        console.print(made)
    return capture.get().strip("\n")


def _cell(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
