"""What the builders of apps take, for tests that look at replicas and ask the model nothing."""

from __future__ import annotations

from typing import Any

# Serve starts no replica of the ingress before somebody asks: it imports the engine, too, and takes
# as long to start as the model's own.
_UNASKED = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1}


def without_ingress(*configs: Any) -> dict[str, Any]:
    """Return the arguments of a builder for an app of these models."""
    ingress = {"autoscaling_config": _UNASKED}
    return {"llm_configs": list(configs), "ingress_deployment_config": ingress}
