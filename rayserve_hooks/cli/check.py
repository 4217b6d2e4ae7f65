"""``rayserve-hooks check``: everything that can be checked, for CI."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from rayserve_hooks.cli import configs
from rayserve_hooks.cli.listing import distribution_of
from rayserve_hooks.cli.output import CheckedDeployment, CheckReport, as_json
from rayserve_hooks.cluster.serve_config import Deployment
from rayserve_hooks.core.loading import resolve
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.errors import CallbackConfigError

_LISTS = (".rayignore", ".gitignore")


def run(options: argparse.Namespace) -> tuple[str, int]:
    """Return what the command prints, and its exit code."""
    try:
        report = check(options.config, options.working_dir)
    except CallbackConfigError as error:
        if not options.json:
            raise
        problems = list(error.problems)
        return as_json(CheckReport(ok=False, deployments=[], problems=problems, unseen=[])), 1
    if options.json:
        return as_json(report), 0
    for unseen in report["unseen"]:
        print(f"rayserve-hooks: {unseen}", file=sys.stderr)
    lines = [
        f"{found['deployment']}: {', '.join(found['callbacks']) or 'no callbacks'}"
        for found in report["deployments"]
    ]
    return "\n".join(["ok", *lines]), 0


def check(path: str, working_dir: str | None = None) -> CheckReport:
    """Check a Serve config and build its callbacks.

    Args:
        path: A Serve config file.
        working_dir: The folder that is the cluster's ``working_dir``: what is imported has to be
            in it, or installed.

    Raises:
        CallbackConfigError: Names everything that is wrong.
    """
    folder = Path(working_dir).resolve() if working_dir else None
    if folder is not None and not folder.is_dir():
        raise CallbackConfigError(
            f"working_dir {str(working_dir)!r} is no folder; name the one that the cluster gets"
        )
    config, found = configs.of_each(path, functools.partial(_names, folder=folder))
    deployments = [
        CheckedDeployment(deployment=deployment.name, callbacks=names)
        for deployment, names in found
    ]
    unseen = [*config.unseen]
    if folder is not None and not _reads_lists():
        unseen += [
            f"{str(folder / name)!r} is not read; install 'rayserve_hooks[cli]' to have it checked"
            for name in _LISTS
            if (folder / name).is_file()
        ]
    return CheckReport(ok=True, deployments=deployments, problems=[], unseen=unseen)


def _names(deployment: Deployment, folder: Path | None) -> Iterator[str]:
    PluginManager(deployment.stack.here())
    problems: list[str] = []
    for entry in deployment.stack.entries:
        yield entry.name
        if folder is not None and not entry.only_on_cluster:
            problems += _outside(entry.name, resolve(entry.callback), folder)
    if problems:
        raise CallbackConfigError(*problems)


def _outside(name: str, found: object, folder: Path) -> Iterator[str]:
    """Yield what would keep what a config names from being imported on the cluster."""
    named = found if inspect.ismodule(found) or inspect.isclass(found) else type(found)
    file = Path(inspect.getsourcefile(named) or "").resolve()
    module = named.__name__ if inspect.ismodule(named) else named.__module__
    if file.is_relative_to(folder):
        ignored = _ignored(file, folder) if _reads_lists() else ""
        if ignored:
            yield (
                f"callback {name!r} is in {str(file)!r}, which {ignored} keeps out of the "
                "working_dir that Ray sends; take it off that list"
            )
        return
    libraries = map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))
    if distribution_of(module) or any(file.is_relative_to(Path(path)) for path in libraries):
        return
    yield (
        f"callback {name!r} is in {str(file)!r}, which is neither in the working_dir "
        f"{str(folder)!r} nor installed; move it there, or install it in the image"
    )


def _reads_lists() -> bool:
    return importlib.util.find_spec("pathspec") is not None


def _ignored(file: Path, folder: Path) -> str:
    """Return the list that keeps a file from being sent; Ray obeys two."""
    from pathspec import GitIgnoreSpec

    for name in _LISTS:
        lines = folder / name
        if lines.is_file():
            spec = GitIgnoreSpec.from_lines(lines.read_text(errors="replace").splitlines())
            if spec.match_file(str(file.relative_to(folder))):
                return name
    return ""
