"""``rayserve-hooks``: see callbacks before anything is deployed; needs no Ray and no cluster."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayserve_hooks.cluster._ray import HOOKS_CALLBACK
from rayserve_hooks.cluster.schema import config_schema
from rayserve_hooks.cluster.stacks import parse_settings
from rayserve_hooks.core.hooks import HOOKS
from rayserve_hooks.core.inspection import hook_functions
from rayserve_hooks.core.loading import short_names
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.errors import CallbackConfigError, Problems
from rayserve_hooks.trace import format_table

Row = dict[str, Any]
_COLUMNS = ("deployment", "hook", "position", "callback", "options", "distribution", "source")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0: the table, JSON or schema has been printed.
        1: the config is wrong; every problem has been printed to standard error.

    Raises:
        SystemExit: The command line itself is wrong (exit code 2), or ``--help`` was asked for.
    """
    options = _parser().parse_args(arguments)
    if options.command == "schema":
        print(json.dumps(config_schema(), indent=2))
        return 0
    # As 'serve run' does: callbacks are often modules beside the config.
    sys.path.insert(0, str(Path(options.app_dir).absolute()))
    try:
        rows = order(options.config) if options.command == "order" else plugins()
    except CallbackConfigError as error:
        print(f"rayserve-hooks: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(rows, indent=2))
    elif rows:
        print(
            format_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])
        )
    else:
        print("no callbacks")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayserve-hooks", description="See callbacks before anything is deployed."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of a table")
    common.add_argument("--app-dir", default=".", help="folder to import callbacks from")
    commands = parser.add_subparsers(dest="command", required=True)
    in_order = commands.add_parser(
        "order", parents=[common], help="print the callbacks of a Serve config in run order"
    )
    in_order.add_argument("config", help="the YAML file that 'serve run' and 'serve deploy' take")
    commands.add_parser("schema", help="print the JSON Schema of a Serve config, for editors")
    commands.add_parser("plugins", parents=[common], help="list the callbacks with a short name")
    return parser


def order(path: str) -> list[Row]:
    """List each deployment's callbacks, hook by hook, in run order, wrappers outermost first.

    Args:
        path: A Serve config file.

    Raises:
        CallbackConfigError: The file is no Serve config, or callbacks in it are wrong; names the
            problems of all deployments.
    """
    problems = Problems()
    rows: list[Row] = []
    for deployment, llm_config in _llm_configs(path):
        with problems.collected():
            try:
                rows.extend(_in_order(deployment, llm_config))
            except CallbackConfigError as error:
                raise CallbackConfigError(
                    *(f"{deployment}: {problem}" for problem in error.problems)
                ) from error
    problems.raise_all()
    return rows


def plugins() -> list[Row]:
    """List what is installed under the entry-point group; what ships here is among it.

    Raises:
        CallbackConfigError: An installed callback cannot be imported.
    """
    problems = Problems()
    rows: list[Row] = []
    for name, entry_point in sorted(short_names().items()):
        with problems.collected():
            try:
                found = entry_point.load()
            except Exception as error:  # importing runs other people's code
                raise CallbackConfigError(f"short name {name!r}: {error!r}") from error
            hooks = {function.hook for function in hook_functions(found)}
            rows.append(
                {
                    "name": name,
                    "callback": entry_point.value,
                    "hooks": [hook for hook in HOOKS if hook in hooks],
                    "distribution": _release(entry_point.dist),
                    "source": _source(found),
                }
            )
    problems.raise_all()
    return rows


def _llm_configs(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Find the LLM configs of a Serve config, each with a name of its deployment."""
    applications = _read(path).get("applications")
    if not isinstance(applications, list):
        raise CallbackConfigError(f"{path!r} has no list 'applications'; name a Serve config file")
    for application in applications:
        if not isinstance(application, Mapping):
            raise CallbackConfigError(f"{path!r}: applications holds {application!r}, no mapping")
        arguments = application.get("args") or {}
        for config in arguments.get("llm_configs") or ():
            # Ray takes the path of a file that holds the config, too.
            llm_config = _read(config) if isinstance(config, str) else config
            model_id = (llm_config.get("model_loading_config") or {}).get("model_id", "?")
            yield f"{application.get('name', 'default')}/{model_id}", llm_config


def _read(path: str) -> Mapping[str, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CallbackConfigError(f"cannot read {path!r}: {error}") from error
    if not isinstance(loaded, dict):
        raise CallbackConfigError(f"{path!r} holds no mapping; name a Serve config file")
    return loaded


def _in_order(deployment: str, llm_config: Mapping[str, Any]) -> Iterator[Row]:
    settings = llm_config.get("callback_config") or {}
    stack = parse_settings(
        settings.get("callback_class") or HOOKS_CALLBACK,
        settings.get("callback_kwargs") or {},
        "raise" if settings.get("raise_error_on_callback", True) else "warn",
    ).for_deployment(deployment)
    manager = PluginManager(stack.here())
    for hook in HOOKS:
        impls = reversed(getattr(manager.hook, hook).get_hookimpls())
        for position, impl in enumerate(impls, start=1):
            function = inspect.unwrap(impl.plugin.original(impl.function))
            options = [name for name in ("wrapper", "tryfirst", "trylast") if impl.opts[name]]
            if inspect.iscoroutinefunction(function):
                options.append("async")
            if manager.warns(impl.plugin_name):
                options.append("on_error=warn")
            distribution = _distribution_of(function.__module__)
            name, source = impl.plugin_name, _source(function)
            yield _row(deployment, hook, position, name, options, distribution, source)
    for position, entry in enumerate(stack.entries, start=1):
        if entry.only_on_cluster:
            options, source = ["only_on_cluster"], str(entry.callback)
            yield _row(deployment, "?", position, entry.name, options, "", source)


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
