"""Fixtures: one real Ray cluster of two nodes and one tiny model for all tests that need them."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent
EXAMPLES = ROOT / "examples"
TESTS = ROOT / "tests"

# Callbacks of the examples and the tests are named by string, here and in Ray's processes.
for folder in (EXAMPLES, TESTS):
    sys.path.insert(0, str(folder))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(EXAMPLES), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"


class RayCluster(NamedTuple):
    """A head node, where deployments fit, and a second node with the resource ``other``."""

    address: str
    dashboard: str
    http_port: int
    head_id: str
    other_id: str
    other_cache: Path


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    from tiny_model import make_tiny_model

    return make_tiny_model(ROOT / ".cache" / "tiny-llama")


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    import processes
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    other_cache = tmp_path_factory.mktemp("other_node_cache")
    with processes.none_left():
        http_port = processes.free_port()
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 8,
                "include_dashboard": True,
                "dashboard_port": processes.free_port(),
                "metrics_export_port": processes.free_port(),
            },
        )
        other = cluster.add_node(
            num_cpus=1, resources={"other": 4}, env_vars={"HF_HOME": str(other_cache)}
        )
        context: Any = ray.init(address=cluster.address, logging_level=logging.WARNING)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": http_port})
            head_id = ray.get_runtime_context().get_node_id()
            yield RayCluster(
                cluster.address,
                f"http://{context.dashboard_url}",
                http_port,
                head_id,
                other.node_id,
                other_cache,
            )
        finally:
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()
