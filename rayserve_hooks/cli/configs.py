"""A Serve config as a command reads it: all that is wrong with it is one error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from rayserve_hooks.cluster import serve_config
from rayserve_hooks.cluster.serve_config import Deployment, ServeConfig
from rayserve_hooks.errors import CallbackConfigError, Problems

T = TypeVar("T")


def read(path: str) -> list[Deployment]:
    """Return the deployments of a file; what cannot be seen in it goes to standard error.

    Raises:
        CallbackConfigError: The file is no Serve config, or something in it is wrong.
    """
    problems = Problems()
    config = serve_config.read(path, problems)
    problems.raise_all()
    say_unseen(config)
    return config.deployments


def of_each(
    path: str, look: Callable[[Deployment], Iterable[T]]
) -> tuple[ServeConfig, list[tuple[Deployment, list[T]]]]:
    """Look at each deployment of a file.

    Raises:
        CallbackConfigError: The file is no Serve config, or callbacks in it are wrong; names the
            problems of all deployments.
    """
    problems = Problems()
    found: list[tuple[Deployment, list[T]]] = []
    config = serve_config.read(path, problems)
    for deployment in config.deployments:
        with problems.collected():
            try:
                found.append((deployment, list(look(deployment))))
            except CallbackConfigError as error:
                texts = (f"{deployment.name}: {_with_advice(text)}" for text in error.problems)
                raise CallbackConfigError(*texts) from error
    problems.raise_all()
    return config, found


def say_unseen(config: ServeConfig) -> None:
    """Name on standard error what cannot be seen in a file."""
    for unseen in config.unseen:
        print(f"rayserve-hooks: {unseen}", file=sys.stderr)


def _with_advice(problem: str) -> str:
    advice = "; --app-dir names the folder to import callbacks from"
    return f"{problem}{advice}" if ": no module named" in problem else problem
