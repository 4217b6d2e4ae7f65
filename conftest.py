"""Fixtures: one real Ray cluster of two nodes and one tiny model for all tests that need them."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent
EXAMPLES = ROOT / "examples"
TESTS = ROOT / "tests"

# Callbacks of the examples and the tests are named by string, here and in Ray's processes, which
# also import the test modules whose classes they get.
FOLDERS = [
    str(folder) for folder in (EXAMPLES, EXAMPLES / "integrations", TESTS, TESTS / "cluster")
]
sys.path[:0] = [*FOLDERS, str(ROOT / "scripts")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*FOLDERS, os.environ.get("PYTHONPATH")]))
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
# By default Serve gives up a proxy that takes five seconds to start, as on a busy machine.
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"

# A shell without job control lets what it starts in the background ignore Ctrl-C, and all that
# starts there inherits it: commands that a test ends so would never end.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["store_fixtures", "rayserve_hooks.testing"]


class RayCluster(NamedTuple):
    """A head node, where all CPUs are, and a second node with the resource ``other``."""

    address: str
    dashboard: str
    http_port: int
    head_id: str
    other_id: str
    other_cache: Path
    cluster: Any


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make every warning an error in tests without Ray; with it, setup.cfg's filters stay.

    Ray and vLLM warn about their own dependencies, in other words with each of their versions.

    With several processes (``-n``), which take a file each, those that take longest come first:
    what starts Ray or an engine, and of that ``cluster/`` later, as it is many files.
    """
    for item in items:
        # In front, so that a test's own filters count more.
        if not _starts_ray(item):
            item.add_marker(pytest.mark.filterwarnings("error"), append=False)
    slow_files = {item.path for item in items if _starts_ray(item)}
    items.sort(key=lambda item: (item.path not in slow_files, "cluster" in item.path.parts))


def _starts_ray(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("ray", "engine"))


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
                # By default a node without CPUs, as the second one, ends a worker that is idle for
                # a second, and the next task of stock Ray's imports an engine again.
                "_system_config": {"idle_worker_killing_time_threshold_ms": 20_000},
            },
        )
        other = cluster.add_node(
            num_cpus=0, resources={"other": 4}, env_vars={"HF_HOME": str(other_cache)}
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
                cluster,
            )
        finally:
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture(autouse=True)
def _log_reaches_caplog(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand our records to caplog directly: Ray and vLLM change what is above ours."""
    if "caplog" not in request.fixturenames:
        return
    handler = request.getfixturevalue("caplog").handler
    monkeypatch.setattr(handler, "level", logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("ray.serve.rayserve_hooks", "rayserve_hooks.download"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "handlers", [handler])
        monkeypatch.setattr(logger, "propagate", False)
        monkeypatch.setattr(logger, "disabled", False)


@pytest.fixture(autouse=True)
def _no_group_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Free the groups that a test made; Ray does it when the process ends that made them."""
    if "ray_cluster" not in request.fixturenames:
        yield
        return
    request.getfixturevalue("ray_cluster")
    from ray import PlacementGroupID
    from ray.util.placement_group import (
        PlacementGroup,
        placement_group_table,
        remove_placement_group,
    )

    before = placement_group_table().keys()
    yield
    for group_id in placement_group_table().keys() - before:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group_id)))
