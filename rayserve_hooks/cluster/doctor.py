"""What can be known of a machine before a deployment: this one, and each node of a cluster.

A node's process imports this module, and none of it imports torch, vLLM or ``ray.serve.llm``.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import getattr_static
from typing import Any

from rayserve_hooks import __version__
from rayserve_hooks.cluster import _vllm, ray_schema, versions
from rayserve_hooks.cluster.serve_config import Deployment
from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.core.failures import Blame
from rayserve_hooks.core.hooks import ENGINE_PROCESS, FIRST_RESULT
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.core.masking import redact
from rayserve_hooks.errors import CallbackConfigError, HooksError, describe, missing_extra
from rayserve_hooks.findings import Finding, State

_INSTALL = "install the same rayserve_hooks in the image of every node"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_GB, _MB = 1e9, 1e6


@dataclass(frozen=True)
class Line:
    """A finding, and what it is about.

    Attributes:
        node: The machine, in words.
        deployment: The deployment; empty if it is about the machine itself.
        finding: What was found.
    """

    node: str
    deployment: str
    finding: Finding


def examine(
    node: str,
    deployments: Sequence[Deployment],
    version: str = __version__,
    *,
    on_cluster: bool = True,
) -> list[Line]:
    """Look at the machine of this process, and at what each deployment needs of it.

    Args:
        node: Names the machine in the lines.
        deployments: What is going to be deployed.
        version: The release of this package that deploys.
        on_cluster: Whether what can be imported on the cluster only can be imported here.
    """
    lines: list[Line] = []
    for deployment in deployments:
        if not on_cluster:
            deployment = replace(deployment, stack=deployment.stack.here())  # noqa: PLW2901
        with _environment(deployment):
            lines += [Line(node, "", finding) for finding in _of_machine(version)]
            lines += [Line(node, deployment.name, finding) for finding in _of(deployment)]
    return list(dict.fromkeys(lines))


@contextlib.contextmanager
def _environment(deployment: Deployment) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(deployment.variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _finding(subject: str, error: Exception, state: State = "problem") -> Finding:
    """Return a finding of an error of ours, whose last clause says what to do."""
    problems = error.problems if isinstance(error, CallbackConfigError) else (str(error),)
    detail, _, advice = "; ".join(problems).rpartition("; ")
    return Finding(subject, state, detail or advice, advice if detail else "see what it names")


def _looked(subject: str, look: Callable[[], Finding], state: State = "problem") -> Finding:
    try:
        return look()
    except HooksError as error:
        return _finding(subject, error, state)
    except Exception as error:  # a doctor says what it could not look at, and goes on
        return Finding(subject, state, redact(describe(error)), "see what the error names")


def _of_machine(version: str) -> Iterator[Finding]:
    yield _looked("Ray", _ray)
    yield _looked("vLLM", _engine)
    if version == __version__:
        yield Finding("rayserve_hooks", "ok", __version__)
    else:
        detail = f"{__version__} here, and {version} deploys"
        yield Finding("rayserve_hooks", "problem", detail, _INSTALL)
    yield _looked("lock folder", _lock_folder)


def _ray() -> Finding:
    versions.check_ray()
    version = versions.ray_version()
    if versions.minor_of(version) in versions.TESTED:
        return Finding("Ray", "ok", f"{version}, which is tested")
    detail = f"{version}, which is not tested; {versions.TRY_ANYWAY} is set"
    return Finding("Ray", "warning", detail, f"{versions.install_ray()}, or try it first")


def _engine() -> Finding:
    ray = f"Ray {versions.ray_version()}"
    absent = [name for name in versions.ENGINE_PACKAGES if versions.is_absent(name)]
    if absent:
        detail, _, advice = missing_extra(
            ray, absent, f"{versions.engine_that_fits()}, wherever replicas run"
        ).rpartition("; ")
        return Finding("vLLM", "problem", detail, advice)
    name, version = versions.installed_vllm()
    if version in versions.fitting_vllm():
        return Finding("vLLM", "ok", f"{name} {version}, which fits {ray}")
    fitting = " or ".join(versions.fitting_vllm()) or "none"
    detail = f"{name} {version}; tested with {ray}, or pinned by it, is {fitting}"
    return Finding("vLLM", "warning", detail, f"install {versions.engine_that_fits()}")


def _vllm_plugins(callbacks: Sequence[str]) -> Finding:
    """Look whether vLLM would run the hook of these callbacks in the engine's processes."""
    problem = _vllm.problem_here()
    if not problem:
        return Finding("VLLM_PLUGINS", "ok", "leaves out nothing of this package")
    detail, _, advice = problem.partition("; ")
    whose = f"; needed by {', '.join(callbacks)}" if callbacks else "; no callback needs it"
    return Finding("VLLM_PLUGINS", "problem" if callbacks else "warning", detail + whose, advice)


def _lock_folder() -> Finding:
    from rayserve_hooks.download import node_lock

    node_lock.check_lock_folder()
    folder = node_lock.lock_folder()
    return Finding("lock folder", "ok", f"{folder} on {node_lock.file_system_of(folder) or '?'}")


def _of(deployment: Deployment) -> Iterator[Finding]:
    try:
        manager = PluginManager(deployment.stack)
    except CallbackConfigError as error:
        yield _finding("callbacks", error)
        brought = False
    else:
        order = manager.run_order()
        names = [entry.name for entry in deployment.stack.entries]
        yield Finding("callbacks", "ok", ", ".join(names) or "none")
        brought = any(order[hook] for hook in FIRST_RESULT)
        yield _vllm_plugins(order[ENGINE_PROCESS])
        for name in names:
            yield from _of_callback(name, manager, deployment)
    yield from _of_model(deployment, brought)


def _of_callback(name: str, manager: PluginManager, deployment: Deployment) -> Iterator[Finding]:
    callback = manager.get_plugin(name)
    if not callable(getattr_static(callback, "doctor", None)):
        return
    blame: Blame = manager.blame(name, "doctor", callback)
    subject = f"callback {name!r}"
    try:
        for finding in callback.doctor(deployment.llm_config):  # type: ignore[union-attr]
            if not isinstance(finding, Finding):
                raise TypeError(
                    f"doctor() yields a {type(finding).__name__}; yield Finding(subject, state, "
                    "detail, advice)"
                )
            yield Finding(
                f"{subject}: {finding.subject}",
                finding.state,
                redact(finding.detail, *blame.secrets_among),
                redact(finding.advice, *blame.secrets_among),
            )
    except Exception as error:  # of any callback
        detail = f"doctor() failed: {redact(describe(error), *blame.secrets_among, error)}"
        yield Finding(subject, "problem", detail, "fix the callback")


def _of_model(deployment: Deployment, brought: bool) -> Iterator[Finding]:
    """Look for the model where the config says it is, and at the folder it goes to.

    ``brought`` is whether a callback could bring the model from elsewhere.
    """
    from rayserve_hooks.download import preflight
    from rayserve_hooks.download.model import is_path

    model_id, uri, extra = source_of(deployment.llm_config)
    state: State = "warning" if brought else "problem"
    if uri is None and is_path(model_id):
        yield Finding("model", "ok", f"{model_id!r} is a folder here")
        return
    if uri is None and not _HUB_ID.fullmatch(model_id):
        advice = "put the model there on every node, or name a bucket or an id of the hub"
        yield Finding("model", state, f"{model_id!r} is no folder here", advice)
        return
    if uri is None and _is_held(model_id):
        state = "warning"  # the engine may do with what is there
    streams = _load_format(deployment.llm_config) in ray_schema.STREAMING_LOAD_FORMATS
    sizes: list[preflight.Wanted] = []

    def found() -> Finding:
        mode = NodeModelDownloadable.MODEL_AND_TOKENIZER
        if uri is None:
            sizes.append(preflight.look_at_hub(model_id, mode))
        else:
            sizes.append(preflight.look_at_bucket(uri, mode))
        what = f"{sizes[0].where}: {sizes[0].files} files, {_shown(sizes[0].size)}"
        return Finding("model", "ok", f"{what}; can be listed and read")

    yield _looked("model", found, state)
    for other in extra:

        def found_extra(uri: str = other) -> Finding:
            wanted = preflight.look_at_bucket(uri, NodeModelDownloadable.MODEL_AND_TOKENIZER)
            return Finding("extra files", "ok", f"{wanted.where}: {wanted.files} files")

        yield _looked("extra files", found_extra)
    if streams:
        yield Finding("cache folder", "ok", "not needed: the engine streams the weights")
        return
    yield _looked("cache folder", lambda: _cache_folder(model_id))
    if sizes:
        yield _looked("free space", lambda: _free_space(model_id, sizes[0].size))


def _cache_folder(model_id: str) -> Finding:
    from rayserve_hooks.download import preflight

    place = preflight.place_of(model_id)
    if place.problem:
        advice = "let the user of the replicas write it, or set HF_HOME to another folder"
        return Finding("cache folder", "problem", place.problem, advice)
    kind = f"{place.folder} on {place.file_system or 'an unknown file system'}"
    if place.file_system in ("tmpfs", "ramfs"):
        advice = "set HF_HOME to a folder on a disk, or count the model's size as memory"
        return Finding("cache folder", "warning", f"{kind}, which is memory", advice)
    if place.file_system and not place.shared:
        detail = f"{kind}, where a lock may count on one node only"
        advice = "let one node at a time use it, or set HF_HOME to a disk of the node"
        return Finding("cache folder", "warning", detail, advice)
    return Finding("cache folder", "ok", kind)


def _is_held(model_id: str) -> bool:
    from rayserve_hooks.download import preflight

    with contextlib.suppress(HooksError):  # said where the folder is looked at
        return preflight.place_of(model_id).held > 0
    return False


def _free_space(model_id: str, size: int) -> Finding:
    from rayserve_hooks.download import preflight

    place = preflight.place_of(model_id)
    missing = max(size - place.held, 0)
    detail = f"{_shown(place.free)} for a model of {_shown(size)}"
    if place.held:
        detail += f", of which the cache holds {_shown(min(place.held, size))}"
    if missing > place.free:
        advice = f"free {_shown(missing - place.free)}, or set HF_HOME to a larger disk"
        return Finding("free space", "problem", detail, advice)
    return Finding("free space", "ok", detail)


def _shown(size: int) -> str:
    return f"{size / _GB:.1f} GB" if size >= _GB else f"{size / _MB:.1f} MB"


def source_of(llm_config: Mapping[Any, Any]) -> tuple[str, str | None, tuple[str, ...]]:
    """Return the model's id or path, its bucket if it has one, and those of its extra files."""
    loading = llm_config.get("model_loading_config")
    loading = loading if isinstance(loading, Mapping) else {}
    model_id, source = str(loading.get("model_id", "")), loading.get("model_source")
    if isinstance(source, Mapping):
        files = source.get("extra_files")
        found = files if isinstance(files, list) else ()
        extra = (file.get("bucket_uri") for file in found if isinstance(file, Mapping))
        return model_id, source.get("bucket_uri"), tuple(map(str, filter(None, extra)))
    if isinstance(source, str) and source.startswith(ray_schema.REMOTE):
        return model_id, source, ()
    return str(source or model_id), None, ()


def _load_format(llm_config: Mapping[Any, Any]) -> object:
    kwargs = llm_config.get("engine_kwargs")
    return kwargs.get("load_format") if isinstance(kwargs, Mapping) else None
