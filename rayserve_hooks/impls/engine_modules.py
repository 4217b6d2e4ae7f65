"""Register what vLLM does not know, in every process of the engine."""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.arguments import checked_arguments


def _dotted(name: str) -> str:
    module, colon, function = name.partition(":")
    parts = [*module.split("."), *(function.split(".") if colon else ())]
    if not all(part.isidentifier() for part in parts):
        raise ValueError("write 'pkg.module', or 'pkg.module:function'")
    return name


Names = Annotated[Sequence[Annotated[str, AfterValidator(_dotted)]], Field(min_length=1)]


class EngineModules:
    """Import modules, and call functions, in every process of the engine before it is built.

    So one registration counts in the replica, where parsers are looked up, and in the engine core
    and its workers, where the model is built. It is once per process; ``ctx.process`` says which.

    Args:
        modules: In this order, ``"pkg.module"`` to import a module, ``"pkg.module:function"`` to
            call a function of it without arguments. Required.

    Raises:
        CallbackConfigError: An argument is wrong; the message names each one.
    """

    @checked_arguments
    def __init__(self, modules: Names) -> None:
        self.modules = tuple(modules)

    def on_before_engine_init(self, ctx: CallbackCtx) -> None:
        for name in self.modules:
            module, _, function = name.partition(":")
            try:
                found = importlib.import_module(module)
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    f"cannot import {module!r} in the {ctx.process}: {error}; install it where "
                    "that process runs, or add its folder to PYTHONPATH in runtime_env",
                    name=error.name,
                ) from error
            if function:
                result = operator.attrgetter(function)(found)()
                if inspect.iscoroutine(result):
                    result.close()
                    raise TypeError(f"{name!r} is an async function; name one without async")
            ctx.log.info("%s: %s %s", ctx.process, "called" if function else "imported", name)
