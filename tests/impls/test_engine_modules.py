from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from plugins_for_tests import refused

from rayserve_hooks import CallbackCtx
from rayserve_hooks.impls.engine_modules import EngineModules
from rayserve_hooks.testing import Outcome, RunStack


class Gone:
    """A worker's machine, on which the module is not installed."""

    def on_before_engine_init(self, ctx: CallbackCtx) -> None:
        if ctx.process.role == "worker":
            sys.modules["registers"] = None  # type: ignore[assignment] # not to be imported


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the name of a module that counts what is done with it."""
    (tmp_path / "registers.py").write_text(
        "calls = ['imported']\n"
        "def register():\n    calls.append('called')\n"
        "class Models:\n    add = staticmethod(lambda: calls.append('added'))\n"
        "async def later():\n    calls.append('never')\n"
        "def fails():\n    raise ValueError('no such architecture')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "registers"
    sys.modules.pop("registers", None)


def run(run_stack: RunStack, *modules: str, before: Sequence[object] = ()) -> Outcome:
    callback = {"callback": EngineModules, "kwargs": {"modules": modules}}
    return run_stack([*before, callback], engine_processes=["engine core", "worker 1"])


def calls() -> list[str]:
    found: list[str] = sys.modules["registers"].calls
    return found


def test_a_module_is_imported_and_a_function_called_in_the_order_of_the_list(
    run_stack: RunStack, module: str
) -> None:
    names = [module, f"{module}:register", f"{module}:Models.add"]
    outcome = run(run_stack, *names).assert_succeeded()
    # One interpreter is all processes here, so the import is one, too.
    assert calls() == ["imported", *["called", "added"] * 3]
    assert outcome.logged("EngineModules") == [
        f"INFO: {process}: {done} {name}"
        for process in ("replica", "engine core", "worker 1")
        for done, name in zip(("imported", "called", "called"), names, strict=True)
    ]


def test_a_module_that_is_not_there_is_named_with_the_process(
    run_stack: RunStack, module: str
) -> None:
    run(run_stack, module, before=[Gone]).assert_failed(
        "cannot import 'registers' in the worker 1: .*; install it where that process runs"
    )


def test_what_a_function_raises_ends_the_start(run_stack: RunStack, module: str) -> None:
    run(run_stack, f"{module}:fails").assert_failed("no such architecture")


def test_a_function_that_would_have_to_be_awaited_is_refused(
    run_stack: RunStack, module: str
) -> None:
    outcome = run(run_stack, f"{module}:later")
    outcome.assert_failed("'registers:later' is an async function")
    assert calls() == ["imported"]


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        ("pkg", "(modules='pkg'): write a list, even of one item"),
        ([], "(modules=[]): give at least 1 items"),
        (["a b"], "(modules[0]='a b'): write 'pkg.module', or 'pkg.module:function'"),
        (["pkg.mod:"], "(modules[0]='pkg.mod:'): write 'pkg.module', or 'pkg.module:function'"),
        ([""], "(modules[0]=''): write 'pkg.module', or 'pkg.module:function'"),
    ],
)
def test_a_wrong_name_is_refused_where_the_config_is_made(modules: Any, text: str) -> None:
    with refused(f"EngineModules{text}"):
        EngineModules(modules)
