"""The reference has every public name, and none is without a docstring."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import api_reference
import pytest

import rayserve_hooks
from rayserve_hooks.core.hooks import HOOKS
from rayserve_hooks.core.loading import short_names

ROOT = Path(__file__).parent.parent.parent
HOMES = rayserve_hooks._HOMES
PUBLIC = sorted({*api_reference.MODULES, *(f"rayserve_hooks.{home}" for home in HOMES.values())})


def source_of(module: str) -> ast.Module:
    path = ROOT / module.replace(".", "/")
    return ast.parse(
        (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    )


def undocumented(body: list[ast.stmt], where: str, hooks: tuple[str, ...]) -> Iterator[str]:
    """Yield the public classes, functions and methods without a docstring."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        marks = {ast.unparse(mark) for mark in node.decorator_list}
        # A setter is documented by its getter, a hook of a callback by the spec.
        if node.name.startswith("_") or node.name in hooks or "overload" in marks:
            continue
        if hooks and any(mark.startswith("hookimpl") for mark in marks):
            continue
        name = f"{where}.{node.name}"
        if not ast.get_docstring(node) and not any(mark.endswith(".setter") for mark in marks):
            yield name
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, name, hooks)


@pytest.mark.parametrize("module", PUBLIC)
def test_nothing_public_is_without_a_docstring(module: str) -> None:
    tree = source_of(module)
    assert ast.get_docstring(tree)
    hooks = HOOKS if ".impls." in module else ()
    body = tree.body
    if module not in api_reference.MODULES:  # there only some names are public
        body = [node for node in body if getattr(node, "name", "") in HOMES]
    assert list(undocumented(body, module, hooks)) == []


def test_the_contract_the_kit_and_every_shipped_callback_have_a_page() -> None:
    shipped = {entry.value.partition(":")[0] for entry in short_names().values()}
    ours = {module for module in shipped if module.startswith("rayserve_hooks.")}
    contract = {"context", "errors", "findings", "hookspecs", "testing", "trace"}
    assert ours | {f"rayserve_hooks.{name}" for name in contract} <= set(api_reference.MODULES)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_reference_has_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "api_reference.py"), str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{tmp_path / 'index.html'}\n")
    whole = (tmp_path / "rayserve_hooks.html").read_text()
    for name in set(rayserve_hooks.__all__) - {"__version__"}:
        home = tmp_path / "rayserve_hooks" / f"{HOMES[name]}.html"
        page = home.read_text() if home.exists() else whole
        assert f'id="{name}"' in page, name
    for module in api_reference.MODULES:
        assert tmp_path.joinpath(*module.split(".")).with_suffix(".html").exists(), module
