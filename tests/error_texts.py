"""The texts of our errors, read from the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "rayserve_hooks"
CLASSES = {
    "CallbackConfigError",
    "DownloadError",
    "HookError",
    "HooksError",
    "InstallationError",
    "PlacementError",
}
MAKERS = {"_failed", "_report", "entry_error", "explained", "step_error"}
"""Functions that make such an error of a text."""
NAMES = {"detail", "problem"}
"""Names of the texts that such an error is made of."""


def raised() -> set[str]:
    """Return the texts that errors of ours are made with, as far as they stand in the code."""
    texts = (
        written(part)
        for room, tree in _trees()
        for node in ast.walk(tree)
        for part in parts(node, room)
    )
    # An error that only puts others' texts together has no words of its own.
    return {what(text) for text in texts if re.search(r"[a-z]{4,}.* ", text)}


def parts(node: ast.AST, room: str) -> list[ast.expr]:
    """Return what may be the text of an error."""
    if isinstance(node, ast.Call):
        function = node.func
        name = getattr(function, "id", getattr(function, "attr", ""))
        lists = getattr(getattr(function, "value", None), "id", "") == "problems"
        if name in CLASSES | MAKERS or (lists and name == "append"):
            return [*node.args, *(word.value for word in node.keywords if word.arg == "detail")]
    elif room not in ("cluster", "cli", "core"):  # which yield and keep other texts, too
        return []
    elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in NAMES:
        return [node.value]
    if isinstance(node, ast.Yield) and node.value is not None:
        return [node.value]
    return []


def everywhere() -> set[str]:
    """Return all texts of the code, an error's or not."""
    texts = (written(node) for _, tree in _trees() for node in ast.walk(tree))
    return {what(text) for text in texts if text}


def written(node: ast.AST) -> str:
    """Return a literal text, with … for each value in it; empty if it is none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        return re.sub("…+", "…", "".join(map(str, parts)))
    return ""


def what(text: str) -> str:
    """Return what a text says before it says what to do; all of it if that has no words."""
    first, _, _ = text.partition("; ")
    return first if re.search("[a-z]{4}", first) else text


def _trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "doctor.py":  # whose details are findings
            yield path.parent.name, ast.parse(path.read_text())
