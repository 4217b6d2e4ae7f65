"""A running cluster for the command line: connected to, its nodes chosen, each looked at."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayserve_hooks import __version__
from rayserve_hooks.cluster import _ray, doctor
from rayserve_hooks.cluster.serve_config import Deployment
from rayserve_hooks.cluster.versions import check_ray
from rayserve_hooks.context import NodeInfo
from rayserve_hooks.errors import CallbackConfigError, describe
from rayserve_hooks.findings import Finding

_ANSWER_S = 300.0


@contextlib.contextmanager
def connected(
    address: str | None, working_dir: str | None = None, *, show_logs: bool = False
) -> Iterator[None]:
    """Connect to a running cluster; inside of a connected process it stays as it is.

    Args:
        address: As ``ray.init`` takes it; None for the one of this machine or of ``RAY_ADDRESS``.
        working_dir: A folder that goes to the nodes' processes, as ``serve run`` sends one.
        show_logs: Whether what the nodes' processes print is shown here, progress bars included.

    Raises:
        CallbackConfigError: There is no such cluster.
        InstallationError: Ray is missing or not tested.
    """
    check_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    runtime_env = {"working_dir": working_dir} if working_dir else None
    try:
        ray.init(
            address=address,
            runtime_env=runtime_env,
            logging_level=logging.ERROR,
            log_to_driver=show_logs,
        )
    except Exception as error:  # Ray's own, of several kinds
        raise CallbackConfigError(
            f"cannot connect to a Ray cluster at {address!r}: {describe(error)}; start it, or "
            "name it with --address"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def chosen(names: Sequence[str]) -> list[NodeInfo]:
    """Return the nodes with these ids or addresses; all that live if none is named.

    The beginning of an id will do, as ``ray list nodes`` has it.

    Raises:
        CallbackConfigError: A name is no node's, or that of several.
    """
    nodes = [node for node, _ in _ray.live_nodes()]
    if not names:
        return nodes
    found: dict[str, NodeInfo] = {}
    for name in names:
        matches = [node for node in nodes if node.address == name] or [
            node for node in nodes if node.id.startswith(name)
        ]
        if len(matches) != 1:
            what = "no node of the cluster" if not matches else f"that of {len(matches)} nodes"
            known = ", ".join(map(str, nodes))
            raise CallbackConfigError(f"node {name!r} is {what}; use one of {known}")
        found[matches[0].id] = matches[0]
    return list(found.values())


def examine_nodes(deployments: Sequence[Deployment], names: Sequence[str]) -> list[doctor.Line]:
    """Have each node look at itself, as `doctor.examine` does; a process must be connected.

    Args:
        deployments: What is going to be deployed. Each is looked at in its runtime environment.
        names: Which nodes; see `chosen`.
    """
    nodes = chosen(names)
    asked = [
        (node, deployment, _ask(node, deployment)) for node in nodes for deployment in deployments
    ]
    lines = [line for question in asked for line in _answer(*question)]
    return list(dict.fromkeys(lines))


def runtime_env_of(deployment: Deployment) -> dict[str, Any]:
    """Return the runtime environment of a deployment's processes, without a folder of this machine.

    Ray takes such a folder where a process connects, and nowhere else.
    """
    own = deployment.llm_config.get("runtime_env")
    merged = {**deployment.runtime_env, **(own if isinstance(own, Mapping) else {})}
    for name in ("working_dir", "py_modules"):
        value = merged.get(name)
        values = value if isinstance(value, list) else [value]
        if any(isinstance(uri, str) and "://" not in uri for uri in values):
            del merged[name]
    variables = deployment.variables
    return {**merged, "env_vars": variables} if variables else merged


def _ask(node: NodeInfo, deployment: Deployment) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(doctor.examine)
    options = task.options(
        num_cpus=0,
        max_retries=0,
        name="rayserve_hooks:doctor",
        scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        runtime_env=runtime_env_of(deployment),
    )
    return options.remote(str(node), [deployment], __version__)


def _answer(node: NodeInfo, deployment: Deployment, answer: Any) -> list[doctor.Line]:
    import ray

    try:
        return list(ray.get(answer, timeout=_ANSWER_S))
    except Exception as error:  # of Ray, in several ways; a node without the package is one
        cause = getattr(error, "cause", None) or error
        text = describe(cause)
        if "No module named 'rayserve_hooks" in text:
            finding = Finding(
                "rayserve_hooks",
                "problem",
                f"the package, or a part of it, is missing there; {__version__} deploys",
                "install rayserve_hooks in the image of every node",
            )
            return [doctor.Line(str(node), "", finding)]
        advice = "see the log of the node's processes, and the deployment's runtime_env"
        finding = Finding("node", "problem", f"cannot be looked at: {text}", advice)
        return [doctor.Line(str(node), deployment.name, finding)]
