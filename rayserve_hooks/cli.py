"""``rayserve-hooks``: see callbacks before anything is deployed; needs no Ray and no cluster."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import inspect
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rayserve_hooks import __version__
from rayserve_hooks.cluster import serve_config
from rayserve_hooks.cluster.ray_callback import RayCallback
from rayserve_hooks.cluster.schema import config_schema
from rayserve_hooks.core.hooks import FIRST_RESULT, HOOKS
from rayserve_hooks.core.inspection import hook_functions
from rayserve_hooks.core.loading import installed
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.errors import CallbackConfigError, Problems, describe
from rayserve_hooks.trace import format_table

Row = dict[str, Any]
_COLUMNS = (
    "deployment",
    "hook",
    "result",
    "position",
    "callback",
    "options",
    "distribution",
    "source",
)


_TRUST = (
    "The callbacks that the file names are imported and built, which runs code of theirs: use it "
    "for files that you trust."
)

_CHECKED = (
    "The file is checked by Ray's rules, without Ray: keys, kinds of values, names that must "
    "differ. Not seen are applications made by Python code of your own, which are named on "
    "standard error, and what only Ray, the engine or the cluster can tell, such as the values in "
    "engine_kwargs and deployment_config. Exit code 1: something is wrong, or there is no LLM "
    "config at all."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0: the table, JSON or schema has been printed. What ``order`` cannot see, such as an
            application that is made by Python code, has been named on standard error.
        1: the config is wrong, or there is no LLM config in it; every problem has been printed to
            standard error.
        141: whoever read the output has closed it, as ``head`` does.

    Raises:
        SystemExit: The command line itself is wrong (exit code 2), or ``--help`` was asked for.
    """
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # a name may be no text
        with contextlib.suppress(AttributeError):  # it is somebody's own
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        print(_output(options), flush=True)
    except CallbackConfigError as error:
        print(f"rayserve-hooks: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Or Python complains when it closes the stream at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _output(options: argparse.Namespace) -> str:
    if options.command == "schema":
        return json.dumps(config_schema(), indent=2)
    # As 'serve run' does: callbacks are often modules beside the config.
    sys.path.insert(0, str(Path(options.app_dir).absolute()))
    if options.command == "order":
        rows = order(options.config, construct=not options.import_only)
    else:
        rows = plugins()
    if options.json:
        return json.dumps(rows, indent=2)
    if not rows:
        return "no callbacks"
    return format_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayserve-hooks", description="See callbacks before anything is deployed."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of a table")
    common.add_argument("--app-dir", default=".", help="folder to import callbacks from")
    commands = parser.add_subparsers(dest="command", required=True)
    in_order = commands.add_parser(
        "order",
        parents=[common],
        help="print the callbacks of a Serve config in run order",
        description=f"Print the callbacks of a Serve config in run order. {_TRUST} {_CHECKED}",
    )
    in_order.add_argument(
        "--import-only",
        action="store_true",
        help="import the callbacks' modules, but build none of them",
    )
    in_order.add_argument("config", help="the YAML file that 'serve run' and 'serve deploy' take")
    commands.add_parser("schema", help="print the JSON Schema of a Serve config, for editors")
    commands.add_parser(
        "plugins",
        parents=[common],
        help="list the callbacks with a short name",
        description="List the callbacks with a short name; importing them runs code of theirs.",
    )
    return parser


def order(path: str, construct: bool = True) -> list[Row]:
    """List each deployment's callbacks, hook by hook, in run order, wrappers outermost first.

    Args:
        path: A Serve config file.
        construct: Whether to build the callbacks. If not, their modules are imported all the same.

    Raises:
        CallbackConfigError: The file is no Serve config, or callbacks in it are wrong; names the
            problems of all deployments.
    """
    problems = Problems()
    rows: list[Row] = []
    config = serve_config.read(path, problems)
    for deployment, stack in config.stacks:
        with problems.collected():
            try:
                rows.extend(_in_order(deployment, stack, construct))
            except CallbackConfigError as error:
                raise CallbackConfigError(
                    *(f"{deployment}: {_with_advice(problem)}" for problem in error.problems)
                ) from error
    problems.raise_all()
    for unseen in config.unseen:
        print(f"rayserve-hooks: {unseen}", file=sys.stderr)
    return rows


def _with_advice(problem: str) -> str:
    advice = "; --app-dir names the folder to import callbacks from"
    return f"{problem}{advice}" if ": no module named" in problem else problem


def plugins() -> list[Row]:
    """List what is installed under the entry-point group; what ships here is among it.

    What cannot be imported, and what another distribution's callback of the same name hides, has
    a row with a note that says so.
    """
    rows: list[Row] = []
    for name, entry_points in sorted(installed().items()):
        for entry_point in entry_points:
            note, found = "", None
            try:
                found = entry_point.load()
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # importing runs other people's code
                note = f"cannot be imported: {describe(error)}"
            hidden_by = _release(entry_points[0].dist)
            if entry_point is not entry_points[0]:
                note = f"hidden by that of {hidden_by}, which is earlier on sys.path; {note}"
            elif len(entry_points) > 1:
                note = f"is the one that {name!r} means: it is earlier on sys.path; {note}"
            hooks = set() if found is None else {hook.hook for hook in hook_functions(found)}
            rows.append(
                {
                    "name": name,
                    "callback": entry_point.value,
                    "hooks": [hook for hook in HOOKS if hook in hooks],
                    "distribution": _release(entry_point.dist),
                    "source": "?" if found is None else _source(found),
                    "note": note.removesuffix("; "),
                }
            )
    return rows


def _in_order(deployment: str, stack: CallbackStack, construct: bool) -> Iterator[Row]:
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
            distribution = _distribution_of(function.__module__)
            name, source = impl.plugin_name, _source(function)
            result = "first wins" if hook in FIRST_RESULT else "all run"
            yield _row(deployment, hook, result, position, name, options, distribution, source)
    for position, entry in enumerate(stack.entries, start=1):
        if entry.only_on_cluster:
            options, source = ["only_on_cluster"], str(entry.callback)
            yield _row(deployment, "?", "", position, entry.name, options, "", source)


def _row(*values: object) -> Row:
    return dict(zip(_COLUMNS, values, strict=True))


def _source(found: object) -> str:
    """Return file:line of a class, function or module."""
    try:
        file = inspect.getsourcefile(found) or "?"  # type: ignore[arg-type]
        return f"{file}:{max(inspect.getsourcelines(found)[1], 1)}"  # type: ignore[arg-type]
    except (OSError, TypeError):
        return "?"


def _distribution_of(module: str) -> str:
    names = _distributions().get(module.partition(".")[0], [])
    return ", ".join(_release(importlib.metadata.distribution(name)) for name in sorted(set(names)))


_distributions = functools.cache(importlib.metadata.packages_distributions)


def _release(distribution: importlib.metadata.Distribution | None) -> str:
    return "" if distribution is None else f"{distribution.name} {distribution.version}"


def _cell(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
