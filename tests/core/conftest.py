"""Modules and distributions that exist for one test."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayserve_hooks.core.loading import short_names


@pytest.fixture
def write_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str], None]]:
    """Write an importable module: its name and source."""
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(name: str, source: str) -> None:
        *parents, last = name.split(".")
        folder = tmp_path.joinpath(*parents)
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(len(parents)):
            tmp_path.joinpath(*parents[: i + 1], "__init__.py").touch()
        (folder / f"{last}.py").write_text(source)
        importlib.invalidate_caches()
        written.append(name)

    yield write
    for name in written:
        for loaded in [m for m in sys.modules if f"{m}.".startswith(name.partition(".")[0] + ".")]:
            del sys.modules[loaded]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Install a distribution that registers entry points of our group."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(lines: str) -> None:
        info = tmp_path / "fetchers-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fetchers\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[rayserve_hooks]\n{lines}\n")
        importlib.invalidate_caches()
        short_names.cache_clear()

    yield write
    monkeypatch.undo()
    short_names.cache_clear()
