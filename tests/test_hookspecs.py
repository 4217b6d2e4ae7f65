import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from plugins_for_tests import make_ctx, make_manager

from rayserve_hooks import hookspecs
from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.hooks import HOOKS
from rayserve_hooks.hookspecs import RayServeLLMCallback, hookimpl

SECTIONS = ["When", "Where", "Not for", "Parameters", "Returns", "Failure", "Since"]


def doc_of(hook: str) -> str:
    doc = inspect.getdoc(getattr(RayServeLLMCallback, hook))
    assert doc
    return doc


@pytest.mark.parametrize("hook", HOOKS)
def test_a_docstring_has_the_same_sections_in_the_same_order(hook: str) -> None:
    assert re.findall(r"^([A-Z][a-z ]*):", doc_of(hook), re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("hook", HOOKS)
def test_a_docstring_starts_with_a_one_line_purpose(hook: str) -> None:
    purpose, blank, *_ = doc_of(hook).splitlines()
    assert purpose.endswith(".")
    assert blank == ""


@pytest.mark.parametrize("hook", HOOKS)
def test_every_parameter_is_documented(hook: str) -> None:
    parameters = doc_of(hook).partition("Parameters:\n")[2].partition("\n\n")[0]
    documented = re.findall(r"^    (\w+):", parameters, re.MULTILINE)
    signature = inspect.signature(getattr(RayServeLLMCallback, hook))
    assert ["self", *documented] == list(signature.parameters)


@pytest.mark.parametrize("hook", HOOKS)
def test_each_docstring_explains_none_and_refuses_the_rest(hook: str) -> None:
    returns = doc_of(hook).partition("Returns:\n")[2].partition("\n\n")[0]
    assert "``None``:" in returns
    assert re.search(r"Anything else.* is an error", returns, re.DOTALL)


@pytest.mark.parametrize("hook", HOOKS)
def test_since_names_a_version(hook: str) -> None:
    assert re.search(r"^Since: \d+\.\d+$", doc_of(hook), re.MULTILINE)


def test_the_file_holds_markers_and_hooks_and_nothing_of_the_managers() -> None:
    tree = ast.parse(Path(hookspecs.__file__).read_text())
    defined = {
        ast.unparse(target)
        for node in tree.body
        for target in getattr(node, "targets", [getattr(node, "target", None)])
        if target is not None
    } | {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert defined == {"PROJECT", "hookspec", "hookimpl", "T", "HookResult", "RayServeLLMCallback"}


def test_the_callback_is_a_plain_class_with_the_hooks_alone() -> None:
    assert RayServeLLMCallback.__mro__ == (RayServeLLMCallback, object)
    assert tuple(name for name in vars(RayServeLLMCallback) if not name.startswith("__")) == HOOKS
    ctx: Any = object()
    assert RayServeLLMCallback().on_before_init(ctx) is None


def test_the_example_on_top_is_a_callback() -> None:
    doc = inspect.getdoc(hookspecs)
    assert doc

    async def fetch(bucket: str) -> str:
        return f"/models/{bucket}"

    names = {"CallbackCtx": CallbackCtx, "Handled": Handled, "hookimpl": hookimpl, "fetch": fetch}
    exec(inspect.cleandoc(doc.partition("::\n")[2]), names)
    manager, ctx = (
        make_manager({"callback": names["MyCallback"], "kwargs": {"bucket": "b"}}),
        make_ctx(),
    )
    assert manager.hook.on_before_init(ctx=ctx) is None
    assert ctx.extra_init_kwargs == {"max_model_len": 4096}
    assert manager.hook.on_before_download(ctx=ctx) == Handled("/models/b")
