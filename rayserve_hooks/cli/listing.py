"""``rayserve-hooks order``, ``plugins`` and ``schema``: what there is; needs no Ray."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import inspect
import textwrap
from collections.abc import Iterator, Mapping

from rayserve_hooks.cli import configs
from rayserve_hooks.cli.output import OrderRow, PluginRow, as_json, table
from rayserve_hooks.cluster.ray_callback import RayCallback
from rayserve_hooks.cluster.schema import config_schema
from rayserve_hooks.cluster.serve_config import Deployment
from rayserve_hooks.core.hooks import FIRST_RESULT, HOOKS, RUNS_IN
from rayserve_hooks.core.inspection import hook_functions
from rayserve_hooks.core.loading import installed, unreadable
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.core.masking import redact
from rayserve_hooks.errors import describe

_LONGEST_NOTE = 300


def run(options: argparse.Namespace) -> tuple[str, int]:
    """Return what one of the commands prints, and its exit code."""
    if options.command == "schema":
        return as_json(config_schema()), 0
    rows: list[OrderRow] | list[PluginRow]
    if options.command == "order":
        rows = order(options.config, construct=not options.import_only)
    else:
        rows = plugins()
    return (as_json(rows) if options.json else table(rows, "no callbacks")), 0


def order(path: str, construct: bool = True) -> list[OrderRow]:
    """List each deployment's callbacks, hook by hook, in run order, wrappers outermost first.

    Args:
        path: A Serve config file.
        construct: Whether to build the callbacks. If not, their modules are imported all the same.

    Raises:
        CallbackConfigError: The file is no Serve config, or callbacks in it are wrong; names the
            problems of all deployments.
    """
    config, found = configs.of_each(path, functools.partial(_in_order, construct=construct))
    configs.say_unseen(config)
    return [row for _, rows in found for row in rows]


def plugins() -> list[PluginRow]:
    """List what is installed under the entry-point group; what ships here is among it.

    What cannot be imported, and what another distribution's callback of the same name hides, has
    a row with a note that says so; so has a distribution whose entry points cannot be read.
    """
    rows: list[PluginRow] = []
    for name, entry_points in sorted(installed().items()):
        for entry_point in entry_points:
            note, found = "", None
            try:
                found = entry_point.load()
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # importing runs other people's code
                note = f"cannot be imported: {_in_a_line(error)}"
            hidden_by = _release(entry_points[0].dist)
            if entry_point is not entry_points[0]:
                note = f"hidden by that of {hidden_by}, which is earlier on sys.path; {note}"
            elif len(entry_points) > 1:
                note = f"is the one that {name!r} means: it is earlier on sys.path; {note}"
            hooks = set() if found is None else {hook.hook for hook in hook_functions(found)}
            if not hooks and found is not None:
                note += "has no hook, so it is no callback"
            rows.append(
                PluginRow(
                    name=name,
                    callback=entry_point.value,
                    hooks=[hook for hook in HOOKS if hook in hooks],
                    distribution=_release(entry_point.dist),
                    source="?" if found is None else _source(found),
                    note=note.removesuffix("; "),
                )
            )
    for distribution, failure in unreadable():
        rows.append(
            PluginRow(
                name="?",
                callback="?",
                hooks=[],
                distribution=_release(distribution),
                source="?",
                note=f"its entry points cannot be read: {_in_a_line(failure)}",
            )
        )
    return rows


def _in_order(deployment: Deployment, construct: bool) -> Iterator[OrderRow]:
    stack = deployment.stack
    manager = PluginManager(stack.here(), construct=construct)
    for hook in HOOKS:
        impls = reversed(getattr(manager.hook, hook).get_hookimpls())
        for position, impl in enumerate(impls, start=1):
            callback, function = impl.plugin.callback, impl.plugin.original(impl.function)
            if isinstance(callback, RayCallback):
                function = callback.method_of(hook)
            function = inspect.unwrap(function)
            options = [name for name in ("wrapper", "tryfirst", "trylast") if impl.opts[name]]
            if inspect.iscoroutinefunction(function):
                options.append("async")
            if manager.warns(impl.plugin_name):
                options.append("on_error=warn")
            yield OrderRow(
                deployment=deployment.name,
                hook=hook,
                result="first wins" if hook in FIRST_RESULT else "all run",
                position=position,
                callback=impl.plugin_name,
                options=options,
                distribution=distribution_of(function.__module__),
                source=_source(function),
                where=deployment.left_out.get(hook, RUNS_IN[hook]),
            )
    for position, entry in enumerate(stack.entries, start=1):
        if entry.only_on_cluster:
            yield OrderRow(
                deployment=deployment.name,
                hook="?",
                result="",
                position=position,
                callback=entry.name,
                options=["only_on_cluster"],
                distribution="",
                source=str(entry.callback),
                where="",
            )


def _source(found: object) -> str:
    """Return file:line of a class, function or module."""
    try:
        file = inspect.getsourcefile(found) or "?"  # type: ignore[arg-type]
        return f"{file}:{max(inspect.getsourcelines(found)[1], 1)}"  # type: ignore[arg-type]
    except Exception:  # there is no source, or it is an object that answers in its own way
        return "?"


def distribution_of(module: str) -> str:
    """Return the distributions that a module may be of, with their versions."""
    names = _distributions().get(module.partition(".")[0], [])
    return ", ".join(_release(importlib.metadata.distribution(name)) for name in sorted(set(names)))


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    try:
        return importlib.metadata.packages_distributions()
    except Exception:  # anybody's distribution can be broken in its own way
        return {}


def _release(distribution: importlib.metadata.Distribution | None) -> str:
    if distribution is None:
        return ""
    with contextlib.suppress(Exception):  # as above
        if distribution.name:
            return f"{distribution.name} {distribution.version}"
    return f"one in {distribution.locate_file('')}"


def _in_a_line(error: BaseException) -> str:
    return textwrap.shorten(redact(describe(error)), _LONGEST_NOTE)
