"""What a cluster can never hold is refused where a deployment is built."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from rayserve_hooks.cluster import _ray, placement
from rayserve_hooks.errors import PlacementError


def config(bundles: list[dict[str, float]], strategy: str = "PACK", **actor: Any) -> Any:
    """Stands in for a config: what is asked of it here is what its engine reserves."""
    engine = SimpleNamespace(placement_bundles=bundles, placement_strategy=strategy)
    return SimpleNamespace(
        model_id="m",
        get_engine_config=lambda: engine,
        deployment_config={"ray_actor_options": actor} if actor else {},
    )


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for a cluster of one node with two CPUs; its values can be changed."""
    facts: dict[str, Any] = {"autoscaler": False, "connected": True}
    monkeypatch.setattr(_ray, "may_build_deployments", lambda: facts["connected"])
    facts["nodes"] = [("n (10.0.0.1)", {"CPU": 2.0})]
    monkeypatch.setattr(_ray, "live_nodes", lambda: facts["nodes"])
    monkeypatch.setattr(_ray, "autoscaler_runs", lambda: facts["autoscaler"])
    return facts


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (config([{"GPU": 1}]), "no node can hold bundle {'CPU': 1, 'GPU': 1}"),
        (config([{"CPU": 2}]), "no node can hold bundle {'CPU': 3}"),
        (config([{"CPU": 1}], num_gpus=1), "no node can hold bundle {'CPU': 2, 'GPU': 1}"),
        (config([{"CPU": 1}, {"CPU": 1}]), "no nodes can hold all bundles, together {'CPU': 3}"),
        (config([], resources={"x": 1}), "no node can hold bundle {'CPU': 1, 'x': 1}"),
    ],
)
def test_what_no_node_has_is_refused(asked: Any, text: str, cluster: dict[str, Any]) -> None:
    with pytest.raises(PlacementError) as caught:
        placement.refuse_unplaceable(asked)
    assert str(caught.value) == (
        f"deployment of 'm': {text}, and no autoscaler runs that would add one: node n (10.0.0.1) "
        "has {'CPU': 2.0}; ask for less in placement_group_config, or where the group is made, or "
        "add nodes"
    )


ONES = [{"CPU": 1}] * 2  # the first bundle has the replica's own CPU, too
TWOS = [{"CPU": 1}, {"CPU": 2}, {"CPU": 2}]


@pytest.mark.parametrize(
    ("bundles", "strategy", "cpus", "text"),
    [
        (TWOS, "PACK", [3, 3], "no nodes can hold all bundles, each on one, [{'CPU': 2}, "),
        (TWOS, "SPREAD", [5, 1], "no nodes can hold all bundles, each on one, [{'CPU': 2}, "),
        ([{"CPU": 2}, {"CPU": 3}], "STRICT_SPREAD", [6, 1], "no 2 nodes are there for the bundles"),
        (ONES, "STRICT_SPREAD", [9], "no 2 nodes are there for the bundles of a STRICT_SPREAD"),
        (TWOS, "PACK", [4, 2], ""),
        (TWOS, "SPREAD", [2, 2, 2], ""),
        (TWOS, "STRICT_SPREAD", [2, 9, 2], ""),
        ([{"CPU": 0.1}] * 30, "PACK", [4], ""),
        ([{"CPU": 1}] * 90, "PACK", [7] * 13, ""),
        ([{"CPU": 1}] * 900, "PACK", [901], ""),
    ],
)
def test_bundles_must_find_a_node_each(
    bundles: list[dict[str, float]],
    strategy: str,
    cpus: list[int],
    text: str,
    cluster: dict[str, Any],
) -> None:
    cluster["nodes"] = [(f"n{number}", {"CPU": float(n)}) for number, n in enumerate(cpus)]
    if not text:
        placement.refuse_unplaceable(config(bundles, strategy))
        return
    with pytest.raises(PlacementError) as caught:
        placement.refuse_unplaceable(config(bundles, strategy))
    assert text in str(caught.value)


@pytest.mark.parametrize("asked", [config([{"CPU": 1}]), config([{"CPU": 2}], num_cpus=0)])
def test_what_fits_is_let_through(asked: Any, cluster: dict[str, Any]) -> None:
    placement.refuse_unplaceable(asked)


def test_with_an_autoscaler_it_warns(
    cluster: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    cluster["autoscaler"] = True
    with caplog.at_level(logging.WARNING):
        placement.refuse_unplaceable(config([{"GPU": 1}]))
    assert "no node can hold bundle" in caplog.text


def test_an_autoscaler_that_has_not_reported_is_waited_for(
    cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster["autoscaler"] = None
    monkeypatch.setattr(placement, "_POLL_S", 0)
    answers = iter([None, None, True])
    monkeypatch.setattr(_ray, "autoscaler_runs", lambda: next(answers, True))
    placement.refuse_unplaceable(config([{"GPU": 1}]))


def test_without_a_cluster_nothing_is_checked(cluster: dict[str, Any]) -> None:
    cluster["connected"] = False
    placement.refuse_unplaceable(config([{"GPU": 1}]))


@pytest.mark.ray
@pytest.mark.slow
def test_stock_builders_refuse_what_the_cluster_can_never_hold(ray_cluster: Any) -> None:
    from ray.serve.llm import build_dp_openai_app, build_openai_app

    import rayserve_hooks

    impossible = {"bundles": [{"no_such_resource": 1}]}
    llm_config = rayserve_hooks.LLMConfig(
        model_id="never", placement_group_config=impossible, callbacks=["startup_metrics"]
    )
    with pytest.raises(PlacementError, match="deployment of 'never': no node can hold bundle"):
        build_openai_app({"llm_configs": [llm_config]})
    with pytest.raises(PlacementError, match="ask for less in placement_group_config"):
        build_dp_openai_app({"llm_config": llm_config})


@pytest.mark.ray
@pytest.mark.slow
def test_the_bundles_are_those_that_ray_gives_to_serve(ray_cluster: Any) -> None:
    from ray.llm._internal.serve.core.server.llm_server import LLMServer
    from ray.serve.llm import LLMConfig

    for fields in (
        {"placement_group_config": {"bundles": [{"CPU": 1}, {"CPU": 2}], "strategy": "SPREAD"}},
        {"engine_kwargs": {"tensor_parallel_size": 2}, "accelerator_type": "L4"},
        {"deployment_config": {"ray_actor_options": {"num_cpus": 2, "memory": 5}}},
    ):
        stock = LLMConfig(model_loading_config={"model_id": "m"}, **fields)
        options = LLMServer.get_deployment_options(stock)
        bundles, strategy = _ray.replica_bundles(stock)
        rays = [{k: v for k, v in b.items() if v} for b in options["placement_group_bundles"]]
        assert (bundles, strategy) == (rays, options["placement_group_strategy"])
