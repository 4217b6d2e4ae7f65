"""Apps for tests that look at replicas and ask the model nothing, and what replicas leave."""

from __future__ import annotations

import contextlib
from typing import Any

import processes
import psutil
from waiting import until

RUNS = "RAYSERVE_HOOKS_TEST_REPLICA"
"""The variable that marks the processes of a test's replica."""

# Serve starts no replica of the ingress before somebody asks: it imports the engine, too, and takes
# as long to start as the model's own.
_UNASKED = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1}


def without_ingress(*configs: Any) -> dict[str, Any]:
    """Return the arguments of a builder for an app of these models."""
    ingress = {"autoscaling_config": _UNASKED}
    return {"llm_configs": list(configs), "ingress_deployment_config": ingress}


def groups_left() -> list[Any]:
    """Return the placement groups that are still there."""
    from ray.util.placement_group import placement_group_table

    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def none_left(mark: object) -> None:
    """Wait for the end of all processes with this value of `RUNS`; an error has their commands."""

    def of_replica() -> list[psutil.Process]:
        # The first replica starts one of Ray's own for the whole cluster, which stays.
        marked = processes.marked(RUNS, str(mark))
        return [process for process in marked if process.name() != "ray::TelemetryAgent"]

    with contextlib.suppress(AssertionError):
        until(lambda: not of_replica())
    left = of_replica()
    assert [(process.name(), process.ppid(), process.cmdline()) for process in left] == []
